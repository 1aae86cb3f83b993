"""Optimizer and learning-rate schedule, by name.

Every one comes from a library; here are their names, their options and the warm-up before them.
bitsandbytes' 8-bit optimizers keep their state in a quarter of the memory; its paged ones let it
move to the CPU's memory when the GPU's is full. Two of its names are left out, as they don't do
what they say: its Adam decays like AdamW, its 8-bit LAMB has no trust ratio and no CUDA kernel.
"""

import math
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LRScheduler,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from .errors import ToolkitError, nearest
from .settings import TrainSettings

# What an optimizer takes of the settings beside learning rate and decay.
ADAM = ("betas", "eps")
LION = ("betas",)
ADAFACTOR = ()

OPTIMIZERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "adamw": ("torch.optim:AdamW", ADAM),
    "adamw_torch": ("torch.optim:AdamW", ADAM),
    "adamw_hf": ("torch.optim:AdamW", ADAM),
    "adam": ("torch.optim:Adam", ADAM),
    "adafactor": ("torch.optim:Adafactor", ADAFACTOR),
    "lamb": ("pytorch_optimizer:Lamb", ADAM),
    "lion": ("pytorch_optimizer:Lion", LION),
    "adamw_8bit": ("bitsandbytes.optim:AdamW8bit", ADAM),
    "adamw_bnb_8bit": ("bitsandbytes.optim:AdamW8bit", ADAM),
    "paged_adamw_8bit": ("bitsandbytes.optim:PagedAdamW8bit", ADAM),
    "paged_adamw_32bit": ("bitsandbytes.optim:PagedAdamW32bit", ADAM),
    "lion_8bit": ("bitsandbytes.optim:Lion8bit", LION),
    "paged_lion_8bit": ("bitsandbytes.optim:PagedLion8bit", LION),
    "paged_lion_32bit": ("bitsandbytes.optim:PagedLion32bit", LION),
}

FUSED = ("torch.optim:AdamW", "torch.optim:Adam")
FUSED_ON = ("cuda",)

Range = tuple[str, Callable[[float], bool]]
POSITIVE: Range = ("above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE: Range = ("from 0", lambda value: 0 <= value < math.inf)
FRACTION: Range = ("between 0 and 1", lambda value: 0 < value < 1)

# Each option's default, whose type is the option's, and range.
SCHEDULES: dict[str, dict[str, tuple[float, Range]]] = {
    "linear": {},
    "WarmupCosine": {},
    "cosine": {},
    "constant": {},
    "CAWR": {
        "rewarm_epoch_num": (1.0, POSITIVE),
        "T_mult": (1, POSITIVE),
        "eta_min": (0.0, NOT_NEGATIVE),
    },
    "CAL": {"rewarm_epoch_num": (1.0, POSITIVE), "eta_min": (0.0, NOT_NEGATIVE)},
    "Step": {"decay_steps": (100, POSITIVE), "decay_rate": (0.999, FRACTION)},
    "ReduceLROnPlateau": {"factor": (0.1, FRACTION), "patience": (10, NOT_NEGATIVE)},
}


def build_optimizer(
    model: nn.Module, settings: TrainSettings, *, total_steps: int, steps_per_epoch: int
) -> dict[str, Any]:
    """Optimizer and schedule, in the shape that Lightning's configure_optimizers returns.

    total_steps, steps_per_epoch: optimizer steps, not batches.

    Raises:
        ToolkitError: for a missing library or an option that the schedule doesn't allow.
    """
    path, taken = OPTIMIZERS[settings.optimizer]
    groups = parameter_groups(model, settings.weight_decay)
    values = {"betas": settings.optimizer_betas, "eps": settings.adam_epsilon}
    options: dict[str, Any] = {name: values[name] for name in taken}
    if path in FUSED and all(p.device.type in FUSED_ON for g in groups for p in g["params"]):
        options["fused"] = True  # one pass over the memory, and nothing as large beside it
    optimizer: Any = _import(path, settings.optimizer)(groups, lr=settings.learning_rate, **options)
    # Lightning refuses to clip for one that could undo the scaling of fp16's gradients by itself.
    optimizer._step_supports_amp_scaling = False  # then torch's scaler undoes it, as for others
    schedule = _build_schedule(
        optimizer, settings, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    config = {"scheduler": schedule, "interval": "step", "monitor": "dev_loss"}
    if isinstance(schedule, ReduceLROnPlateau):
        # Lightning would step it by batches or epochs; only the training knows of the dev runs.
        config["frequency"] = sys.maxsize
    return {"optimizer": optimizer, "lr_scheduler": config}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trained parameters in two groups: matrices, which decay; biases and norms, which don't.

    A group without parameters is left out.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    others = [p for p in trained if p.dim() <= 1]
    groups = ((matrices, weight_decay), (others, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def warmup_steps(settings: TrainSettings, total_steps: int) -> int:
    """Steps of the warm-up: as set, but at most a tenth of all; none for ReduceLROnPlateau."""
    if settings.scheduler_type == "ReduceLROnPlateau":
        return 0
    return min(settings.warmup_steps, total_steps // 10)


def schedule_options(settings: TrainSettings) -> dict[str, Any]:
    """All options of the schedule: those of settings.scheduler, and defaults for the rest.

    Raises:
        ToolkitError: for an unknown option (with the nearest known one) or a value not allowed.
    """
    kind, known = settings.scheduler_type, SCHEDULES[settings.scheduler_type]
    options: dict[str, Any] = {name: default for name, (default, _) in known.items()}
    for name, value in settings.scheduler.items():
        if name not in known:
            hint = " It has no effect." if name == "verbose" else nearest(name, known)
            allowed = ", ".join(known) or "none"
            raise ToolkitError(
                f"scheduler: {kind} has no option {name!r}; allowed: {allowed}.{hint}"
            )
        number = type(options[name])
        bounds, allows = known[name][1]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # 2.0 passes for 2: what read the settings may have made it one.
        if not (is_number and allows(value) and number(value) == value):
            expected = "a whole number" if number is int else "a number"
            raise ToolkitError(f"scheduler: {name} {value!r}; allowed: {expected} {bounds}")
        options[name] = number(value)
    return options


def _import(path: str, optimizer: str) -> Callable[..., Optimizer]:
    try:
        return pkgutil.resolve_name(path)
    except ModuleNotFoundError as error:
        raise ToolkitError(
            f"optimizer {optimizer} needs {error.name}: pip install {error.name}, or use adamw"
        ) from None


def _build_schedule(
    optimizer: Optimizer, settings: TrainSettings, *, total_steps: int, steps_per_epoch: int
) -> LRScheduler:
    options = schedule_options(settings)
    period = max(1, round(options.pop("rewarm_epoch_num", 0) * steps_per_epoch))
    warmup = warmup_steps(settings, total_steps)
    after: LRScheduler
    match settings.scheduler_type:
        case "linear":
            return get_linear_schedule_with_warmup(optimizer, warmup, total_steps)
        case "WarmupCosine" | "cosine":
            return get_cosine_schedule_with_warmup(optimizer, warmup, total_steps)
        case "constant":
            return get_constant_schedule_with_warmup(optimizer, warmup)
        case "ReduceLROnPlateau":
            return ReduceLROnPlateau(optimizer, **options)
        case "Step":
            after = StepLR(optimizer, options["decay_steps"], options["decay_rate"])
        case "CAWR":
            after = CosineAnnealingWarmRestarts(optimizer, period, **options)
        case "CAL":
            after = CosineAnnealingLR(optimizer, period, **options)
    if warmup == 0:  # a milestone of 0 makes SequentialLR of older torch skip the first step
        return after
    rise = get_constant_schedule_with_warmup(optimizer, warmup)
    return SequentialLR(optimizer, [rise, after], milestones=[warmup])
