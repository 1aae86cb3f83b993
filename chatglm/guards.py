"""What stops a training before it wastes a night: each guard says what, where, and what to do."""

import contextlib
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import model_inputs
from .errors import ToolkitError
from .loss import IGNORE
from .run_settings import Settings

GIB = 2**30


def check_labels(batch: dict[str, Any]) -> None:
    """Only answers are learned: nothing up to and including <sop>, and something after it.

    batch: of batches.collate, on the CPU.

    Raises:
        ToolkitError: with the samples' ids.
    """
    rows, columns = (batch["labels"] != IGNORE).nonzero(as_tuple=True)  # of what is learned
    if "packed" in batch:
        packed = batch["packed"]
        rows, columns = packed.sequence[columns], packed.column[columns]
        contexts = packed.context_lengths
    else:
        contexts = batch["context_lengths"]
    number = len(batch["sample_index"])
    in_prompt = rows[columns <= contexts[rows]].bincount(minlength=number) > 0
    nothing = (rows.bincount(minlength=number) == 0) & (batch["sample_index"] >= 0)
    for wrong, what in ((in_prompt, "learn tokens of their prompt"), (nothing, "learn nothing")):
        if wrong.any():
            raise ToolkitError(
                f"samples {batch['sample_index'][wrong].tolist()} {what}: build the records anew"
                " (delete them, run python data_utils.py)"
            )


def check_loss(
    loss: float, model: nn.Module, batch: dict[str, Any], *, step: int, precision: str
) -> None:
    """Stop at a loss that is not finite, or exactly 0.

    Raises:
        ToolkitError: with the step, the first layer with non-finite values, and the samples' ids.
    """
    if math.isfinite(loss) and loss != 0:
        return
    samples = batch["sample_index"].tolist()
    if loss == 0:
        raise ToolkitError(
            f"the loss became 0 at step {step} on samples {samples}: nothing is learned from"
            " them; the weights may be damaged, or the answers empty"
        )
    layer = first_nonfinite_layer(model, batch)
    advice = {
        "16": "use precision bf16, whose range is that of 32 bits",
        "bf16": "lower learning_rate, or look at these samples",
    }.get(precision, "lower learning_rate, or look at these samples")
    where = f"first in {layer}" if layer else "in the loss alone"
    raise ToolkitError(
        f"the loss became {loss} at step {step}, {where}, on samples {samples}: {advice}"
    )


@torch.no_grad()
def first_nonfinite_layer(model: nn.Module, batch: dict[str, Any]) -> str:
    """Name of the first module whose parameters or output are not finite, or "".

    A module is done after those inside it, so the innermost one is named.
    """
    found: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, _, output) -> None:
            tensors = [output] if isinstance(output, Tensor) else []
            tensors += list(module.parameters(recurse=False))
            if not found and any(
                not torch.isfinite(t).all() for t in tensors if t.is_floating_point()
            ):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        model(**model_inputs(batch), use_cache=False, loss_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


def check_gradients(named_gradients: Iterable[tuple[str, Tensor | None]]) -> None:
    """After the first backward pass: every trained parameter has a gradient, and not all are zero.

    Raises:
        ToolkitError: with the names of those that have none.
    """
    gradients = list(named_gradients)
    without = [name for name, gradient in gradients if gradient is None]
    if without:
        more = f" and {len(without) - 5} more" if len(without) > 5 else ""
        raise ToolkitError(
            f"no gradient reaches {', '.join(without[:5])}{more}: these would be saved untrained"
        )
    if not any(gradient.any() for _, gradient in gradients if gradient is not None):
        raise ToolkitError("all gradients are zero after the first step: nothing would be trained")


def check_scale(scale: float, *, step: int) -> None:
    """Stop when 16-bit training skips step after step: each halves the scale of the loss.

    Raises:
        ToolkitError: if the scale has fallen below 1, from 65536 at the start.
    """
    if scale < 1:
        raise ToolkitError(
            f"the gradients of 16-bit training overflow at any scale, at step {step}: use precision"
            " bf16, whose range is that of 32 bits"
        )


def check_disk(folder: str, needed: int) -> None:
    """Room for the checkpoints to come, in bytes; those that stand there are replaced.

    Raises:
        ToolkitError: with what is needed and what is free.
    """
    standing = [p for name in ("best", "last", "resume") for p in Path(folder, name).rglob("*")]
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in standing)
    if free < needed:
        raise ToolkitError(
            f"{folder}: {free / GIB:.1f} GiB are free, but the checkpoints of this run need"
            f" {needed / GIB:.1f} GiB (best, last and resume, each written aside before it replaces"
            " the older): free some, or give save_dir on another disk"
        )


@contextlib.contextmanager
def explaining_memory(settings: Settings) -> Iterator[None]:
    """Around loading and training: a full memory ends with what to change.

    Raises:
        ToolkitError: instead of torch's OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        reason = reason.split(" Process ")[0].split(" Including ")[0]  # then: who holds the rest
        raise ToolkitError(f"{reason} {out_of_memory_advice(settings)}") from None


def out_of_memory_advice(settings: Settings) -> str:
    """What to change when a device's memory does not suffice, in the order of its effect."""
    train, advice = settings.train, []
    if settings.method in ("full", "freeze"):
        advice.append("train LoRA instead (lora_info_args.with_lora true)")
    elif not settings.quantization:
        advice.append("hold the frozen weights in int4 (quantization_bit 4, or load_in_4bit)")
    if train.gradient_checkpointing != "full":
        advice.append("set gradient_checkpointing full")
    if train.train_batch_size > 1:
        half = train.train_batch_size // 2
        twice = train.gradient_accumulation_steps * 2
        advice.append(f"set train_batch_size {half} and gradient_accumulation_steps {twice}")
    if settings.method in ("full", "freeze") and "8bit" not in train.optimizer:
        advice.append("use optimizer paged_adamw_8bit")
    advice.append(f"lower max_seq_length {train.max_seq_length}")
    if not train.enable_deepspeed:
        advice.append("set enable_deepspeed with ./config/deepspeed_offload.json")
    numbered = "; ".join(f"({number}) {text}" for number, text in enumerate(advice, start=1))
    return f"in the order of effect: {numbered}"
