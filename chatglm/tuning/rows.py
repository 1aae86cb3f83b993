"""PEFT's adapters, stacked for batches in which each row has its own (row_adapters.py)."""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from ..errors import ToolkitError
from ..row_adapters import RowAdapters, RowLinear


def reason_against_rows(tuned: PeftModel) -> str | None:
    """Why an adapter can't be chosen row by row, or None: it changes more than products."""
    configs: dict[str, Any] = tuned.peft_config
    for name, config in configs.items():
        if getattr(config, "use_dora", False):
            return f"adapter {name!r} is DoRA"
        if config.modules_to_save:
            return f"adapter {name!r} replaces {', '.join(config.modules_to_save)}"
        if config.bias != "none" or getattr(config, "lora_bias", False):
            return f"adapter {name!r} changes biases"
    return None


def with_row_adapters(tuned: PeftModel) -> Any:
    """The model under the adapters, which each row of a batch chooses from `row_adapters`.

    Raises:
        ToolkitError: if `reason_against_rows` has one.
    """
    reason = reason_against_rows(tuned)
    if reason:
        raise ToolkitError(
            f"{reason}, and can't be served beside others: serve it alone, or merge it (python"
            " infer_lora_finetuning.py --enable_merge_weight)"
        )
    model: Any = tuned.get_base_model()
    model.row_adapters = adapters = RowAdapters(list(tuned.peft_config), model.device)
    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, _stacked(module, path, adapters))
    return model


def _stacked(module: Any, path: str, adapters: RowAdapters) -> RowLinear:
    if not isinstance(module, LoraLayer) or not hasattr(module.get_base_layer(), "in_features"):
        raise ToolkitError(f"adapters on {path}, a {type(module).__name__}, can't be served mixed")
    parts = [_down_and_up(module, name) for name in adapters.names]
    there = [part for part in parts if part is not None]
    rank = max(down.shape[0] for down, _ in there)
    (_, columns), (rows, _) = there[0][0].shape, there[0][1].shape
    downs = there[0][0].new_zeros(1 + len(parts), rank, columns)
    ups = there[0][0].new_zeros(1 + len(parts), rows, rank)
    for number, part in enumerate(parts, start=1):
        if part is not None:
            down, up = part
            downs[number, : down.shape[0]], ups[number, :, : down.shape[0]] = down, up
    return RowLinear(module.get_base_layer(), downs, ups, adapters)


@torch.no_grad()
def _down_and_up(layer: Any, name: str) -> tuple[Tensor, Tensor] | None:
    """The two matrices whose product an adapter adds to a linear, if it is on this one."""
    if name not in layer.lora_A:
        return None
    scaling = layer.scaling[name]
    if isinstance(layer, AdaLoraLayer):
        # SVDLinear.forward in peft.tuners.adalora: singular values, and the number of them.
        down, up = layer.lora_A[name] * layer.lora_E[name], layer.lora_B[name]
        return down, up * (scaling / (layer.ranknum[name] + 1e-5))
    return layer.lora_A[name].weight, layer.lora_B[name].weight * scaling
