"""What happens beside the steps: saving the best and the last weights, drawing the loss."""

import os
from collections.abc import Callable
from typing import Literal

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar

from .settings import TrainSettings


class SaveBestAndLast(lightning.Callback):
    """After each epoch writes last/, and best/ when the dev loss (else the train loss) fell."""

    def __init__(self, folder: str, save: Callable[[str], None]):
        self.folder, self.save = folder, save
        self.best = float("inf")

    def on_train_epoch_end(self, trainer, module) -> None:
        """Lightning runs the dev set before this."""
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        loss = float(metrics.get("dev_loss", metrics["train_loss"]))
        if loss < self.best:
            self.best = loss
            self.save(os.path.join(self.folder, "best"))
        if trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop:
            return
        self.save(os.path.join(self.folder, "last"))

    def on_train_end(self, trainer, module) -> None:
        """The final weights."""
        if trainer.is_global_zero:
            self.save(os.path.join(self.folder, "last"))

    def on_exception(self, trainer, module, exception) -> None:
        """Ctrl-C keeps what was learned; after any other error the last good weights stay."""
        if isinstance(exception, KeyboardInterrupt):
            self.on_train_end(trainer, module)


class LossCurve(lightning.Callback):
    """Draws train and dev loss into loss_curve.png after every epoch."""

    def __init__(self, path: str):
        self.path = path
        self.train: list[tuple[int, float]] = []
        self.dev: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        """Remember the loss of this step."""
        # Lightning has divided the loss by the number of accumulated batches.
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        self.train.append((trainer.global_step, loss))

    def on_train_epoch_end(self, trainer, module) -> None:
        """Remember the dev loss; print a line; draw."""
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        line = f"epoch {trainer.current_epoch + 1}: train loss {float(metrics['train_loss']):.4f}"
        if "dev_loss" in metrics:
            self.dev.append((trainer.global_step, float(metrics["dev_loss"])))
            line += f", dev loss {self.dev[-1][1]:.4f}"
        print(line)
        self.draw()

    def draw(self) -> None:
        """Write the picture aside and rename it."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 5))
        for name, points in (("train", self.train), ("dev", self.dev)):
            if points:
                axes.plot(*zip(*points, strict=True), label=name)
        axes.set(xlabel="optimizer step", ylabel="loss", yscale="log", title="ChatGLM training")
        axes.grid(alpha=0.3)
        axes.legend()
        aside = f"{self.path}.part"
        figure.savefig(aside, format="png", dpi=100)
        pyplot.close(figure)
        os.replace(aside, self.path)


def build_trainer(
    settings: TrainSettings, save: Callable[[str], None], *, has_dev_set: bool
) -> lightning.Trainer:
    """The Lightning Trainer for these settings."""
    os.makedirs(settings.save_dir, exist_ok=True)
    from lightning.pytorch.loggers import TensorBoardLogger

    return lightning.Trainer(
        max_epochs=settings.epochs,
        max_steps=settings.max_steps,
        devices=settings.devices,
        precision=lightning_precision(settings.precision),
        accumulate_grad_batches=settings.gradient_accumulation_steps,
        gradient_clip_val=settings.max_grad_norm or None,
        limit_val_batches=1.0 if has_dev_set else 0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=5,
        logger=TensorBoardLogger(settings.save_dir, name="events", version=""),
        callbacks=[
            SaveBestAndLast(settings.save_dir, save),
            LossCurve(os.path.join(settings.save_dir, "loss_curve.png")),
            TQDMProgressBar(),
        ],
    )


def lightning_precision(precision: str) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    """Lightning's name for ours; "auto" is bf16 where the GPU computes in it, else 32."""
    import torch

    if precision == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bf16" if has_bf16 else "32"
    if precision == "32":
        return "32-true"
    return "bf16-mixed" if precision == "bf16" else "16-mixed"
