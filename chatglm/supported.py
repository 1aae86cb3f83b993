"""Which models the kernels can decode with, and what a captured step depends on in one."""

from typing import Any

import torch
from torch import nn

from .kernels import ops, products
from .quantization.linear import QuantizedLinear
from .row_adapters import RowLinear


def reason_against(model: Any) -> str | None:
    """Why the kernels can't decode with this model, or None if they can."""
    if model.device.type != "cuda":
        return "the model is not on a CUDA device"
    for module, plain in ((model.transformer.word_embeddings, nn.Embedding),
                          (model.lm_head, nn.Linear)):  # fmt: skip
        if type(module) is not plain:
            return f"in place of its {plain.__name__} stands a {type(module).__name__}"
    if model.config.head_width != 128:
        return f"its heads are {model.config.head_width} wide"
    if model.lm_head.out_features % 32:
        return f"its vocabulary of {model.lm_head.out_features} is no multiple of 32"
    linears = linears_of(model.transformer.layers)
    strange = next((one for one in linears if stored_linear(one) is None), None)
    if strange is not None:
        return f"its linears are {type(strange).__module__}.{type(strange).__name__}"
    stored = [*map(stored_linear, linears), model.lm_head]
    return _reason_against_tensors(model, stored) or ops.reason_against_card(model.device.index)


def _reason_against_tensors(model: Any, stored: list[Any]) -> str | None:
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    modules = (model.transformer.word_embeddings, *norms, *stored)
    read = [tensor for module in modules for tensor in module.parameters()]
    dtypes = {tensor.dtype for tensor in read if tensor.is_floating_point()}
    if len({tensor.device for tensor in read}) > 1:
        return "its weights stand on several devices"
    if len(dtypes) > 1 or not dtypes <= {torch.float16, torch.bfloat16}:
        return f"its precision is {', '.join(sorted(str(d).split('.')[1] for d in dtypes))}"
    for linear in stored:
        x = torch.empty(linear.in_features, dtype=next(iter(dtypes)), device=linear.weight.device)
        if not products.supports_linear(x, linear.weight):
            return "the shape of its weights, or the card, does not suit them"
    return None


def linears_of(layers: Any) -> list[Any]:
    """Those of all blocks, in the order of their use."""
    return [
        linear
        for layer in layers
        for linear in (
            layer.attention.query_key_value,
            layer.attention.dense,
            layer.mlp.dense_h_to_4h,
            layer.mlp.dense_4h_to_h,
        )
    ]


def stored_linear(linear: Any) -> Any:
    """The linear itself, or the one under adapters; None where it is of another kind."""
    if isinstance(linear, RowLinear):
        linear = linear.linear
    if type(linear).__module__.startswith(("peft.tuners.lora", "peft.tuners.adalora")):
        linear = linear.base_layer
    return linear if type(linear) in (nn.Linear, QuantizedLinear) else None


def adapters_of(model: Any) -> tuple:
    """What can change about adapters while their weights stay where they are."""
    return tuple(
        (
            tuple(module.active_adapters),
            tuple(module.merged_adapters),
            module.disable_adapters,
            tuple(module.scaling.items()),
        )
        for module in linears_of(model.transformer.layers)
        if hasattr(module, "active_adapters")
    )
