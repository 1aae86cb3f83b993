"""The LightningModule: what one step of training and of evaluation is."""

import math
import time

import lightning
import torch

from .errors import ToolkitError
from .optim import build_optimizer
from .settings import TrainSettings


class ChatGLMTraining(lightning.LightningModule):
    """Trains the model handed to it on batches of `batches.collate`.

    Raises:
        ToolkitError: at the first loss that is not finite, with the step and its samples.
    """

    def __init__(self, model: torch.nn.Module, settings: TrainSettings):
        super().__init__()
        self.model, self.settings = model, settings
        self.tokens_seen, self.clock = 0, time.monotonic()

    def forward(self, batch) -> torch.Tensor:
        """The loss of a batch, a scalar."""
        return self.model(
            input_ids=batch["input_ids"],
            labels=batch["labels"],
            context_lengths=batch["context_lengths"],
            mask_positions=batch["mask_positions"],
            use_cache=False,
        ).loss

    def on_train_epoch_start(self) -> None:
        """Speed is counted within the epoch."""
        self.tokens_seen, self.clock = 0, time.monotonic()

    def training_step(self, batch, batch_index: int) -> torch.Tensor:
        """Loss of one batch, logged with the speed in tokens a second (pads not counted)."""
        loss = self(batch)
        value = loss.item()
        if not math.isfinite(value):
            raise ToolkitError(
                f"the loss became {value} at step {self.global_step + 1} on samples"
                f" {batch['sample_index'].tolist()}: lower learning_rate, or use precision bf16"
            )
        self.tokens_seen += int(batch["num_tokens"])
        speed = self.tokens_seen / max(time.monotonic() - self.clock, 1e-9)
        size = len(batch["input_ids"])
        self.log("train_loss", loss, prog_bar=True, batch_size=size)
        self.log("tokens_per_second", speed, prog_bar=True, batch_size=size)
        self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=size)
        return loss

    def validation_step(self, batch, batch_index: int) -> None:
        """Dev loss, weighted by learned tokens, so that batch sizes don't matter."""
        learned = int((batch["labels"] >= 0).sum())
        self.log("dev_loss", self(batch), prog_bar=True, on_epoch=True, batch_size=learned)

    def configure_optimizers(self):
        """AdamW; the schedule moves every optimizer step."""
        optimizer, schedule = build_optimizer(
            self.model, self.settings, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
