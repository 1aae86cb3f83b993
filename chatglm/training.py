"""The LightningModule: what one step of training and of evaluation is."""

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from .batches import (
    BatchPlan,
    Entry,
    SampleDataset,
    build_loader,
    longest_batch,
    model_inputs,
)
from .errors import ToolkitError
from .guards import check_gradients, check_labels, check_loss, check_scale
from .optim import build_optimizer
from .records import RecordFolder, read_manifest
from .run_settings import Settings
from .sharding import whole_gradient
from .tuning.adapters import plain_model

COUNTED_BATCHES = 1000
"""Of an epoch, to say how full batches are."""


class TrainingData:
    """The record folders of a run: "train", and maybe "mix" and "dev".

    files_per_entry: of train_file, where its entries have weights.
    """

    def __init__(
        self,
        records: dict[str, RecordFolder],
        *,
        pad_token_id: int,
        files_per_entry: Sequence[int] = (),
        packing: bool = True,
    ):
        self.records, self.pad_token_id, self.packing = records, pad_token_id, packing
        ends = np.searchsorted(records["train"].index["file"], np.cumsum(files_per_entry))
        self.samples_per_entry = np.diff(ends, prepend=0).tolist()
        self.to_train = [records[split] for split in ("train", "mix") if split in records]
        lengths = [r.lengths() for r in self.to_train]
        self.tokens, self.learned = (np.concatenate(part) for part in zip(*lengths, strict=True))

    def entries(self, settings: Settings) -> list[Entry]:
        """Those of train_file with their weights; [] if none are set."""
        weights = settings.train.train_file_weights
        return [Entry(*pair) for pair in zip(self.samples_per_entry, weights, strict=True)]

    def plan(self, settings: Settings, *, rank: int = 0, world_size: int = 1) -> BatchPlan:
        """The batches of an epoch for one process."""
        return BatchPlan(
            self.learned,
            batch_size=settings.train.train_batch_size,
            accumulate=settings.train.gradient_accumulation_steps,
            rank=rank,
            world_size=world_size,
            shuffle_seed=settings.train.seed,
            entries=self.entries(settings),
            num_mixed=len(self.records["mix"]) if "mix" in self.records else 0,
            mix_ratio=settings.train.mix_ratio,
            drop_last=settings.train.drop_last,
        )

    def describe_epoch(self, settings: Settings, *, world_size: int) -> Iterator[str]:
        """What weights and drop_last make of an epoch, a line each; none without them."""
        train, plan = settings.train, self.plan(settings, world_size=world_size)
        for name, entry in zip(train.train_file, self.entries(settings), strict=False):
            samples, per_epoch = f"{entry.num_samples:,} samples", f"{entry.per_epoch:,} an epoch"
            yield f"{name}: {samples} x {entry.weight:g} = {per_epoch}"
        if train.drop_last:
            left, all_samples = f"{plan.num_left_out:,}", f"{plan.num_samples:,}"
            yield f"drop_last: {left} of the {all_samples} samples of each epoch are left out"

    def steps_per_epoch(self, settings: Settings, *, world_size: int) -> int:
        """Optimizer steps of one pass."""
        batches = len(self.plan(settings, world_size=world_size))
        return -(-batches // settings.train.gradient_accumulation_steps)

    def total_steps(self, settings: Settings, *, world_size: int) -> int:
        """Optimizer steps of the whole training."""
        train, an_epoch = settings.train, self.steps_per_epoch(settings, world_size=world_size)
        total = an_epoch * (train.max_epochs or 1)
        return total if train.max_steps == -1 else min(total, train.max_steps)

    def train_loader(self, plan: BatchPlan) -> DataLoader:
        """The plan's batches, the mixed-in samples after the others."""
        return self._loader(SampleDataset(*self.to_train), plan)

    def dev_loader(self, *, batch_size: int, rank: int, world_size: int) -> DataLoader | list:
        """This process's share of the dev set, in file order; [] without one."""
        if "dev" not in self.records:
            return []
        dev = self.records["dev"]
        plan = BatchPlan(dev.lengths()[1], batch_size=batch_size, rank=rank, world_size=world_size)
        return self._loader(SampleDataset(dev), plan)

    def _loader(self, dataset: SampleDataset, plan: BatchPlan) -> DataLoader:
        return build_loader(dataset, plan, pad_token_id=self.pad_token_id, packing=self.packing)

    def longest_batch(self, batch_size: int, *, packing: bool) -> dict[str, Any]:
        """The batch of so many samples that takes the most memory."""
        return longest_batch(
            SampleDataset(*self.to_train),
            self.tokens,
            batch_size=batch_size,
            pad_token_id=self.pad_token_id,
            packing=packing,
        )

    def describe_batches(self, settings: Settings, *, world_size: int) -> str:
        """How full batches are, a line; of the first ones of an epoch."""
        batches = itertools.islice(self.plan(settings, world_size=world_size), COUNTED_BATCHES)
        lengths = [self.tokens[[max(item.index, 0) for item in batch]] for batch in batches]
        real = sum(int(one.sum()) for one in lengths)
        padded = sum(int(one.max()) * len(one) for one in lengths)
        fill = f"{real / padded:.0%} of the tokens of padded batches are real"
        if self.packing:
            mean = f"{real / len(lengths):,.0f} on average"
            return f"packing: all tokens of a batch are real, {mean}; {fill}"
        return f"without packing: {fill}"

    def digest(self) -> str:
        """Of what the records were built from: data, tokenizer, template, lengths."""
        sources = {split: read_manifest(r.path)["source"] for split, r in self.records.items()}
        return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()


class ChatGLMTraining(lightning.LightningModule):
    """Trains the model handed to it; every random draw follows from the seed and the step.

    So a run that goes on from a checkpoint draws what it would have drawn, without the states of
    the generators.

    Raises:
        ToolkitError: at the first loss that is not finite or is zero, or if the first step leaves a
            trained parameter without gradient.
    """

    strict_loading = False  # a checkpoint has the trained parameters only; checked below

    def __init__(self, model: nn.Module, settings: Settings, data: TrainingData):
        super().__init__()
        self.model: Any = model  # what PEFT adds to a module is not declared
        self.run_settings, self.data = settings, data
        self.tokens_seen, self.clock = 0, time.monotonic()
        self.plan: BatchPlan | None = None
        self.resumed_at: tuple[int, int] | None = None
        self.dev_step = -1
        self.epoch_loss, self.epoch_learned, self.train_loss = 0.0, 0, 0.0

    def train_dataloader(self):
        """This process's share of the batches."""
        self.plan = self.data.plan(
            self.run_settings, rank=self.trainer.global_rank, world_size=self.trainer.world_size
        )
        if self.resumed_at is not None:
            epoch, done = self.resumed_at
            over = done >= len(self.plan)
            self.plan.epoch, self.plan.start_batch = epoch + over, 0 if over else done
        return self.data.train_loader(self.plan)

    def val_dataloader(self):
        """This process's share of the dev set."""
        return self.data.dev_loader(
            batch_size=self.run_settings.train.eval_batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a training batch, a scalar."""
        return self._loss(self.model, batch, num_items_in_batch=batch["num_items_in_batch"])

    def _loss(self, model: nn.Module, batch: dict[str, Tensor], **options) -> Tensor:
        return model(**model_inputs(batch), use_cache=False, loss_only=True, **options).loss

    def on_train_epoch_start(self) -> None:
        """Speed and mean loss are counted within the epoch."""
        self.tokens_seen, self.clock = 0, time.monotonic()
        self.epoch_loss, self.epoch_learned = 0.0, 0

    def on_before_batch_transfer(self, batch, dataloader_idx: int):
        """Labels are looked at while they are on the CPU."""
        check_labels(batch)
        return batch

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        """Dropout draws from the seed, the step and the rank."""
        assert self.plan is not None
        step = self.current_epoch * len(self.plan) + batch_idx
        torch.manual_seed(
            (self.run_settings.train.seed << 32) + step * self.trainer.world_size
            + self.trainer.global_rank
        )  # fmt: skip

    def training_step(self, batch, batch_idx: int) -> Tensor:
        """Loss of one batch, logged with the speed in tokens a second (pads not counted)."""
        train, loss = self.run_settings.train, self(batch)
        self.tokens_seen += int(batch["num_tokens"])
        learned = int(batch["learned_tokens"])
        if learned:  # else a filler
            shown = loss.detach() * batch["num_items_in_batch"] / learned
            self._report(shown, batch, learned)
        # Lightning divides by the accumulated batches, and DeepSpeed once more.
        again = train.gradient_accumulation_steps if train.enable_deepspeed else 1
        return loss * again

    def _report(self, loss: Tensor, batch: dict[str, Tensor], learned: int) -> None:
        """Check the mean loss of a batch, count it towards the epoch's, and log."""
        train, value = self.run_settings.train, loss.item()
        step = self.global_step + 1
        check_loss(value, self.model, batch, step=step, precision=train.precision)
        self.epoch_loss += value * learned
        self.epoch_learned += learned
        seconds = max(time.monotonic() - self.clock, 1e-9)
        speed = self.tokens_seen * self.trainer.world_size / seconds
        self.log("train_loss", loss, prog_bar=True, batch_size=learned)
        self.log("tokens_per_second", speed, prog_bar=True, batch_size=learned)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("learning_rate", rate, batch_size=learned)

    def _epoch_sums(self) -> tuple[float, int]:
        """Loss and learned tokens of this epoch so far, of all ranks; every rank calls it."""
        if self.trainer.world_size == 1:
            return self.epoch_loss, self.epoch_learned
        sums = torch.tensor([self.epoch_loss, self.epoch_learned], device=self.device)
        loss, learned = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        return loss, round(learned)

    def mean_train_loss(self) -> float:
        """Over the learned tokens of this epoch so far, of all ranks; every rank calls it."""
        loss, learned = self._epoch_sums()
        return loss / max(learned, 1)

    def on_train_end(self) -> None:
        """The last epoch's loss, while the ranks can still meet."""
        self.train_loss = self.mean_train_loss()

    def on_train_batch_end(self, outputs, batch, batch_idx: int) -> None:
        """The end by max_steps; Lightning's own makes it take up a finished epoch again."""
        if self.global_step == self.run_settings.train.max_steps:
            self.trainer.should_stop = True

    def on_before_optimizer_step(self, optimizer) -> None:
        """After the first backward pass."""
        if self.trainer.global_step == 0:
            check_gradients(
                (name, whole_gradient(parameter))
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            )

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        """The step; AdaLoRA then allots ranks by the gradients, which stand until the next."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            check_scale(scaler.get_scale(), step=self.global_step)
        if self.run_settings.method == "adalora" and self._gradients_are_finite():
            self.model.base_model.update_and_allocate(self.trainer.global_step)

    def _gradients_are_finite(self) -> bool:
        """False when the scaler of 16-bit training has skipped the step."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)

    def validation_step(self, batch, batch_idx: int) -> None:
        """Dev loss over all learned tokens, so that batch sizes don't matter, and perplexity."""
        learned = int(batch["learned_tokens"])
        # AdaLoRA's wrapper would add its own term to the loss; its base has the adapters as well.
        loss = self._loss(plain_model(self.model), batch)
        # Lightning rounds the ranks' mean batch size down to a whole number: make it one.
        size = learned * self.trainer.world_size
        self.log("dev_loss", loss, prog_bar=True, on_epoch=True, batch_size=size, sync_dist=True)

    def on_validation_end(self) -> None:
        """A plateau is judged once per dev run; Lightning would count batches or epochs."""
        self.dev_step = self.global_step
        schedule = self.lr_schedulers() if self.trainer.state.fn == TrainerFn.FITTING else None
        if isinstance(schedule, ReduceLROnPlateau):
            schedule.step(self.trainer.callback_metrics["dev_loss"])

    def configure_optimizers(self):
        """Optimizer and schedule by their names in the settings."""
        settings, world_size = self.run_settings, self.trainer.world_size
        return build_optimizer(
            self.model,
            settings.train,
            total_steps=self.data.total_steps(settings, world_size=world_size),
            steps_per_epoch=self.data.steps_per_epoch(settings, world_size=world_size),
        )

    def _trained_names(self) -> set[str]:
        return {name for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Trained parameters only; the frozen ones are in their own folder."""
        trained = self._trained_names()
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: tensor for n, tensor in state.items() if n in trained}
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        checkpoint["batches"] = (self.current_epoch, progress.ready)
        checkpoint["epoch_loss"] = self._epoch_sums()
        if self.run_settings.method == "adalora":
            allocator = self.model.base_model.rankallocator
            names = ("ipt", "exp_avg_ipt", "exp_avg_unc")
            checkpoint["ranks"] = {name: getattr(allocator, name) for name in names}
            checkpoint["rank_pattern"] = self.model.peft_config["default"].rank_pattern

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Trained parameters must be the same ones; the position in the data is taken up.

        Raises:
            ToolkitError: naming those that differ.
        """
        stored = checkpoint.get("state_dict")  # DeepSpeed keeps them in files of its own
        differing = stored.keys() ^ self._trained_names() if stored else set()
        if differing:
            raise ToolkitError(
                "resume: the checkpoint is of other trained parameters, such as"
                f" {sorted(differing)[0]}: start anew with --resume false"
            )
        self.resumed_at = checkpoint["batches"]
        if self.trainer.is_global_zero:  # the sums of all ranks
            self.epoch_loss, self.epoch_learned = checkpoint["epoch_loss"]
        if self.run_settings.method == "adalora":
            for name, value in checkpoint["ranks"].items():
                setattr(self.model.base_model.rankallocator, name, value)
            self.model.peft_config["default"].rank_pattern = checkpoint["rank_pattern"]
