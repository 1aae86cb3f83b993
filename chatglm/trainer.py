"""The Lightning Trainer for a run's settings: devices, precision, strategy, callbacks."""

import logging
import os
import signal
import sys
import warnings
from typing import Any, ClassVar, Literal

import lightning
from lightning.pytorch.callbacks import Callback, EarlyStopping, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

from .callbacks import DirectCheckpointIO, resume_folder
from .cluster import Cluster, set_network_interface
from .run_settings import Settings
from .sharding import AnyDeviceDeepSpeed, read_deepspeed_config
from .watchdog import Watchdog

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # tips and device tables
warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")  # the plan is
warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)`")
warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated")  # of DeepSpeed
warnings.filterwarnings("ignore", message=".*each worker will save a shard")  # of resume/ alone


class _Watched:
    """Mixed into a strategy: the watchdog runs from before the ranks meet until they part."""

    watchdog: Watchdog | None = None
    watch: ClassVar[dict[str, Any]] = {}

    def setup_distributed(self: Any) -> None:
        """Start watching first, so that a machine that never comes is named."""
        self.set_world_ranks()
        nodes = self.cluster_environment
        if self.world_size > 1:
            self.watchdog = Watchdog(
                self.global_rank,
                self.world_size,
                address=nodes.main_address,
                port=nodes.main_port,
                **self.watch,
            )
            self.watchdog.start()
        set_network_interface(os.environ)
        super().setup_distributed()  # type: ignore[misc]

    def teardown(self) -> None:
        """An end is no loss."""
        if self.watchdog is not None:
            self.watchdog.stop()
        super().teardown()  # type: ignore[misc]


class WatchedDDP(_Watched, DDPStrategy):
    """Lightning's DDP with the watchdog."""


class WatchedDeepSpeed(_Watched, AnyDeviceDeepSpeed):
    """Lightning's DeepSpeed with the watchdog."""


class WatchRanks(lightning.Callback):
    """Hands an error to the watchdog, which knows whether a lost rank is behind it."""

    def on_train_start(self, trainer, module) -> None:
        """SIGTERM is Ctrl-C: Lightning would have all ranks meet, which hangs when one got it.

        Rank 0 acts on it, and ends the others of its machine when it has saved: if they left
        first, it might wait for them in a collective, where it hears of nothing.
        """
        follows = trainer.global_rank > 0 and trainer.node_rank == 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN if follows else signal.default_int_handler)

    def on_exception(self, trainer, module, exception) -> None:
        """Before any other callback saves or says something."""
        if trainer.is_global_zero:
            print(file=sys.stderr)  # below the progress bar
        watchdog = getattr(trainer.strategy, "watchdog", None)
        if watchdog is not None:
            watchdog.on_exception(exception)


def build_trainer(
    settings: Settings, callbacks: list[Callback], cluster: Cluster, *, has_dev_set: bool
) -> lightning.Trainer:
    """The Trainer; it needs the settings with their "auto" and null filled in."""
    train = settings.train
    if train.early_stopping_patience is not None:
        early = EarlyStopping(
            "dev_loss",
            patience=train.early_stopping_patience,
            check_on_train_epoch_end=False,  # after resume/ is written, its count would be lost
            verbose=True,
        )
        callbacks = [early, *callbacks]
    every = train.eval_every_steps
    batches = None if every is None else every * train.gradient_accumulation_steps
    strategy = build_strategy(settings, cluster)
    splits = isinstance(strategy, DeepSpeedStrategy)
    return lightning.Trainer(
        max_epochs=train.max_epochs,
        devices=cluster.devices,
        num_nodes=cluster.num_nodes,
        strategy=strategy,
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
        plugins=[] if splits else [DirectCheckpointIO()],  # DeepSpeed writes its own files
        callbacks=[WatchRanks(), *callbacks, TQDMProgressBar()],
    )


def build_strategy(settings: Settings, cluster: Cluster) -> str | DDPStrategy:
    """DeepSpeed if it is enabled, else DDP over several devices, else Lightning's own choice."""
    train = settings.train
    watch = {
        "timeout_seconds": train.rank_timeout_seconds,
        "advice": f"The same command goes on with what {resume_folder(settings)} holds",
    }
    if train.enable_deepspeed:
        config = read_deepspeed_config(train.deepspeed_config)
        config["train_micro_batch_size_per_gpu"] = train.train_batch_size
        strategy: Any = WatchedDeepSpeed(config=config, exclude_frozen_parameters=True)
    elif cluster.world_size > 1:
        strategy = WatchedDDP()
    else:
        return "auto"
    strategy.watch = watch
    return strategy


def lightning_precision(precision: str) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    """Lightning's name for ours."""
    names: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
        "32": "32-true",
        "bf16": "bf16-mixed",
        "16": "16-mixed",
    }
    return names[precision]
