"""What happens beside the steps: the rehearsal, saving, resuming, and drawing the loss."""

import contextlib
import json
import math
import os
import pathlib
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from safetensors import SafetensorError
from torch import Tensor

from .errors import ToolkitError
from .files import recover_folder, replace_folder
from .guards import check_gradients
from .run_settings import Settings
from .sharding import is_split, whole_state

STATE_FILE = "state.ckpt"
RUN_FILE = "run.json"


class Rehearsal(lightning.Callback):
    """Before the first step, a forward and backward pass over the longest batch.

    What would run out of memory in the middle of an epoch does so now. Nothing is drawn or changed:
    the gradients are thrown away, and every step seeds its own draws.
    """

    def __init__(self, batch: dict[str, Any]):
        self.batch = batch

    def on_train_start(self, trainer, module) -> None:
        """Run it; print the peak of the card's memory. Not under DeepSpeed, which splits up."""
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            return
        batch = trainer.strategy.batch_to_device(self.batch)
        trained = {n: p for n, p in module.model.named_parameters() if p.requires_grad}
        with trainer.precision_plugin.forward_context():
            loss = module(batch)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        check_gradients(zip(trained, gradients, strict=True))
        del loss, gradients
        if trainer.is_global_zero and module.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(module.device) / 2**30
            total = torch.cuda.get_device_properties(module.device).total_memory / 2**30
            tokens = self.batch["input_ids"].numel()
            print(f"rehearsal on the longest batch, {tokens:,} tokens: peak"
                  f" {peak:.2f} GiB of {total:.1f}, the optimizer's state not counted")  # fmt: skip
        self.batch = {}


class SaveTrained(lightning.Callback):
    """Writes last/ after each epoch and at the end, and best/ whenever the dev loss fell.

    Without a dev set, best/ is by the train loss of an epoch. `save` writes and checks a folder.
    """

    def __init__(self, folder: str, save: Callable[[dict, str], None], *, has_dev_set: bool):
        self.folder, self.save, self.has_dev_set = folder, save, has_dev_set
        self.best, self.dev_step = float("inf"), -1

    def state_dict(self) -> dict[str, Any]:
        """For resuming."""
        return {"best": self.best, "dev_step": self.dev_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """On resuming."""
        self.best, self.dev_step = state_dict["best"], state_dict["dev_step"]

    def on_validation_end(self, trainer, module) -> None:
        """A new dev loss."""
        self.dev_step = trainer.global_step
        self._keep_best(trainer, float(trainer.callback_metrics["dev_loss"]))

    def on_train_epoch_end(self, trainer, module) -> None:
        """Lightning runs the dev set before this."""
        if not self.has_dev_set:
            self._keep_best(trainer, module.mean_train_loss())
        if trainer.current_epoch + 1 < trainer.max_epochs and not trainer.should_stop:
            self._save(trainer, "last")

    def on_train_end(self, trainer, module) -> None:
        """The final weights."""
        self._save(trainer, "last")

    def on_exception(self, trainer, module, exception) -> None:
        """Ctrl-C keeps what was learned; after any other error the last good weights stay.

        The ranks are not at the same place any more, so rank 0 acts alone, if it has all weights.
        """
        if not isinstance(exception, KeyboardInterrupt) or not trainer.is_global_zero:
            return
        if is_split(module.model):
            print("interrupted: the weights are split over the devices, last/ stays as it was")
        else:
            self._write(trainer, whole_state(module.model), "last")
            print(f"interrupted: what was learned is in {os.path.join(self.folder, 'last')}")

    def _keep_best(self, trainer, loss: float) -> None:
        if loss < self.best:
            self.best = loss
            self._save(trainer, "best")

    def _save(self, trainer, name: str) -> None:
        state = whole_state(trainer.lightning_module.model)  # all ranks together
        if trainer.is_global_zero:
            self._write(trainer, state, name)
        trainer.strategy.barrier()

    def _write(self, trainer, state: dict[str, Tensor], name: str) -> None:
        folder = os.path.join(self.folder, name)
        with writing(folder), trainer.precision_plugin.forward_context():
            self.save(state, folder)


@contextlib.contextmanager
def writing(folder: str) -> Iterator[None]:
    """Around a save: a full disk or a failed write is one line, and the older folder stands."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(f"{folder}.part", ignore_errors=True)
        reason = " ".join(str(error).split())[:200]
        raise ToolkitError(
            f"{folder}: could not be written ({reason}); what was saved before stands. Make room,"
            " then the same command goes on"
        ) from error


class SaveResume(lightning.Callback):
    """Writes resume/, from which a run that was cut off goes on; removes it at the end.

    After every epoch but the last and every `save_every_steps` steps (-1: never): trained
    parameters, optimizer, schedule, position in the data and counts of the other callbacks.
    """

    def __init__(self, settings: Settings, data_digest: str, state: str | None):
        """state: of find_resume."""
        self.settings, self.state = settings, state
        self.folder, self.every = resume_folder(settings), settings.train.save_every_steps
        self.run = {"settings": json.loads(settings.as_json()), "data": data_digest}
        self.is_due = False

    def setup(self, trainer, module, stage) -> None:
        """All machines must train the same on the same, and go on from the same step.

        Raises:
            ToolkitError: on the machine that differs from the first one.
        """
        if stage != "fit":
            return
        step = read_run(self.folder).get("step", 0) if self.state else 0
        first, first_step = trainer.strategy.broadcast((self.run, step))
        differing = differences(self.settings, self.run["data"], first)
        if differing:
            raise ToolkitError(
                f"the first machine has other {', '.join(differing)}: start the same command on all"
                " machines, with the same files"
            )
        if step != first_step:
            raise ToolkitError(
                f"{self.folder}: the first machine goes on from step {first_step}, this one from"
                f" {step}: give a save_dir that all machines share, or copy the first one's resume/"
                " to the others, or start anew with --resume false"
            )
        if isinstance(trainer.strategy, DeepSpeedStrategy) and self.every >= 0:
            self._check_shared(trainer)

    def _check_shared(self, trainer) -> None:
        """Each rank writes its part of DeepSpeed's state, and reads all of them."""
        path = f"{self.folder}.{trainer.strategy.broadcast(secrets.token_hex(4))}"
        if trainer.is_global_zero:
            open(path, "w").close()
        trainer.strategy.barrier()
        is_shared = os.path.exists(path)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            os.remove(path)
        if not is_shared:
            raise ToolkitError(
                f"{self.folder}: with DeepSpeed every machine writes a part of it: give a save_dir"
                " that all machines share, or --save_every_steps -1"
            )

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        """Within an epoch. A step that a dev run follows leaves it to the next one.

        What follows from the dev run, such as the rate of a plateau, belongs into the same state.
        """
        step, loop = trainer.global_step, trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            return
        self.is_due |= self.every > 0 and step % self.every == 0
        dev_every = self.settings.train.eval_every_steps
        dev_follows = dev_every is not None and step % dev_every == 0
        if self.is_due and not dev_follows and not loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer, module) -> None:
        """The epoch is whole."""
        goes_on = not trainer.should_stop and trainer.current_epoch + 1 < trainer.max_epochs
        if self.every >= 0 and goes_on:
            self._save(trainer)

    def _save(self, trainer) -> None:
        self.is_due = False
        aside = f"{self.folder}.part"
        with writing(self.folder):
            if trainer.is_global_zero:
                shutil.rmtree(aside, ignore_errors=True)
                os.makedirs(aside)
            trainer.strategy.barrier()
            trainer.save_checkpoint(os.path.join(aside, STATE_FILE))
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                run = {**self.run, "step": trainer.global_step}
                with open(os.path.join(aside, RUN_FILE), "w", encoding="utf-8") as file:
                    json.dump(run, file, ensure_ascii=False, indent=2)
                replace_folder(aside, self.folder)

    def on_train_end(self, trainer, module) -> None:
        """The trained weights are saved; nothing is left to go on with, on any machine."""
        for folder in (self.folder, f"{self.folder}.part"):  # of a kill while it was written
            shutil.rmtree(folder, ignore_errors=True)


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes straight into the file; Lightning's own builds it in memory first."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """The file stands aside until it is whole."""
        torch.save(checkpoint, path)


def resume_folder(settings: Settings) -> str:
    """Where a run keeps what it needs to go on."""
    return os.path.join(settings.train.save_dir, "resume")


def find_resume(settings: Settings, data_digest: str) -> str | None:
    """Path of the state to go on from, or None to start anew; says which.

    Raises:
        ToolkitError: if it is of a run with other settings or data, or `resume` is true and there
            is none.
    """
    folder = resume_folder(settings)
    recover_folder(folder)
    path = os.path.join(folder, STATE_FILE)
    if settings.train.resume is False:
        shutil.rmtree(folder, ignore_errors=True)
    if not os.path.exists(path):
        if settings.train.resume:
            raise ToolkitError(f"--resume: {folder} does not exist; leave resume out to start anew")
        return None
    if os.path.isfile(path) and not zipfile.is_zipfile(path):  # as torch.save writes
        raise ToolkitError(f"{path}: damaged; --resume false drops it and starts anew")
    differing = differences(settings, data_digest, read_run(folder))
    if differing:
        raise ToolkitError(
            f"{folder} holds an unfinished run with other {', '.join(differing)}: give that back"
            " to go on, or another save_dir, or --resume false to drop it and start anew"
        )
    print(f"{folder}: going on with the unfinished run")
    return path


def read_run(folder: str) -> dict[str, Any]:
    """What stands beside the state in resume/: settings, data and step of its run.

    Raises:
        ToolkitError: if it can't be read.
    """
    path = os.path.join(folder, RUN_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise ToolkitError(
            f"{path}: damaged ({error}); --resume false drops it and starts anew"
        ) from None


def differences(settings: Settings, data_digest: str, run: dict[str, Any]) -> list[str]:
    """Names of what would make another run of this one."""
    differing = settings.differing(run["settings"])
    return differing if run["data"] == data_digest else [*differing, "data"]


class LossCurve(lightning.Callback):
    """Draws train and dev loss into loss_curve.png after every epoch."""

    def __init__(self, path: str):
        self.path = path
        self.train: list[tuple[int, float]] = []
        self.dev: list[tuple[int, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """For resuming."""
        return {"train": self.train, "dev": self.dev}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """On resuming."""
        self.train, self.dev = list(state_dict["train"]), list(state_dict["dev"])

    def on_train_start(self, trainer, module) -> None:
        """A kill while drawing has left its part."""
        pathlib.Path(f"{self.path}.part").unlink(missing_ok=True)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        """Remember the loss of this step."""
        if batch["learned_tokens"]:
            self.train.append((trainer.global_step, float(trainer.callback_metrics["train_loss"])))

    def on_validation_end(self, trainer, module) -> None:
        """Remember the dev loss; print it, unless the line of the epoch will."""
        loss = float(trainer.callback_metrics["dev_loss"])
        self.dev.append((trainer.global_step, loss))
        fitting = trainer.state.fn == TrainerFn.FITTING
        if trainer.is_global_zero and not (fitting and trainer.fit_loop.epoch_loop.done):
            print(f"step {trainer.global_step}: {_dev_line(loss)}")
        if trainer.is_global_zero and not fitting:  # the dev run after the last step
            self.draw()

    def on_train_epoch_end(self, trainer, module) -> None:
        """Print a line; draw."""
        train_loss = module.mean_train_loss()
        if not trainer.is_global_zero:
            return
        line = f"epoch {trainer.current_epoch + 1}: train loss {train_loss:.4f}"
        if self.dev and self.dev[-1][0] == trainer.global_step:
            line += f", {_dev_line(self.dev[-1][1])}"
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


def _dev_line(loss: float) -> str:
    return f"dev loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}"
