"""One method, applied: which parameters train, in which precision, and the table of them."""

from collections import Counter

import torch
from torch import nn

from ..errors import ToolkitError
from ..model import ChatGLMForConditionalGeneration
from ..run_settings import Settings
from .adapters import add_adalora, add_lora
from .freeze import freeze_layers
from .fused_lora import fuse_lora
from .prompt import train_prefix


def apply_method(
    model: ChatGLMForConditionalGeneration, settings: Settings, *, total_steps: int
) -> nn.Module:
    """Freeze, wrap and cast for `settings.method`; trained parameters get trained_precision.

    Raises:
        ToolkitError: if nothing would train.
    """
    tuned: nn.Module = model
    if settings.method == "freeze":
        freeze_layers(model, settings.model.global_num_layers_freeze)
    elif settings.method == "ptuning":
        assert settings.model.pre_seq_len is not None
        train_prefix(
            model,
            pre_seq_len=settings.model.pre_seq_len,
            prefix_projection=bool(settings.model.prefix_projection),
        )
    elif settings.method == "lora":
        tuned = add_lora(model, settings.lora)
        if settings.train.fused_kernels:
            fuse_lora(tuned)
    elif settings.method == "adalora":
        tuned = add_adalora(model, settings.adalora, total_steps=total_steps)
    dtype = torch.float32 if settings.train.trained_precision == "32" else torch.bfloat16
    if not settings.train.enable_deepspeed:  # it has an fp32 copy of its own
        _cast_trained(tuned, dtype)
    if not any(parameter.requires_grad for parameter in tuned.parameters()):
        raise ToolkitError("no parameter of this model is trained: check the method's settings")
    return tuned


def _cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """On a CPU norms go along, trained or not: it computes none whose weight is in less than its
    input or its bias."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            with_them = isinstance(module, nn.LayerNorm) and parameter.device.type == "cpu"
            if parameter.requires_grad or with_them:
                parameter.data = parameter.data.to(dtype)


def parameter_table(model: nn.Module) -> str:
    """Trained and frozen parameters by kind of module, with counts and precision."""
    rows: Counter[tuple[str, str, str]] = Counter()
    for name, parameter in model.named_parameters():
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        kind = kind.removeprefix("base_model.model.").removeprefix("transformer.")
        state = "trained" if parameter.requires_grad else "frozen"
        rows[(state, kind, str(parameter.dtype).removeprefix("torch."))] += parameter.numel()
    total = sum(rows.values())
    trained = sum(count for (state, _, _), count in rows.items() if state == "trained")
    lines = [
        f"{state:8} {count:>14,}  {dtype:9} {kind}"
        for (state, kind, dtype), count in sorted(
            rows.items(), key=lambda r: (r[0][0], r[0][1]), reverse=True
        )
    ]
    lines.append(f"trained {trained:,} of {total:,} stored values ({trained / total:.3%})")
    return "\n".join(lines)
