"""The Lightning Trainer for a run's settings: devices, precision, strategy, callbacks."""

import logging
import os
import warnings
from typing import Literal

import lightning
from lightning.pytorch.callbacks import Callback, EarlyStopping, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from .callbacks import DirectCheckpointIO
from .settings import Settings

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # tips and device tables
warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")  # the plan is
warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)`")


def build_trainer(
    settings: Settings, callbacks: list[Callback], *, has_dev_set: bool
) -> lightning.Trainer:
    """The Trainer; it needs the settings with their "auto" and null filled in."""
    train = settings.train
    os.makedirs(train.save_dir, exist_ok=True)
    if train.early_stopping_patience is not None:
        patience = train.early_stopping_patience
        callbacks = [*callbacks, EarlyStopping("dev_loss", patience=patience, verbose=True)]
    every = train.eval_every_steps
    batches = None if every is None else every * train.gradient_accumulation_steps
    return lightning.Trainer(
        max_epochs=train.max_epochs,
        max_steps=train.max_steps,
        devices=train.devices or 1,
        precision=lightning_precision(train.precision),
        accumulate_grad_batches=train.gradient_accumulation_steps,
        gradient_clip_val=train.max_grad_norm or None,
        limit_val_batches=1.0 if has_dev_set else 0,
        val_check_interval=batches,
        check_val_every_n_epoch=1 if batches is None else None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the plan shares the batches out
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=5,
        logger=TensorBoardLogger(train.save_dir, name="events", version=""),
        plugins=[DirectCheckpointIO()],
        callbacks=[*callbacks, TQDMProgressBar()],
    )


def lightning_precision(precision: str) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    """Lightning's name for ours."""
    names: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
        "32": "32-true",
        "bf16": "bf16-mixed",
        "16": "16-mixed",
    }
    return names[precision]
