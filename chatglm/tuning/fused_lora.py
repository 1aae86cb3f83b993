"""LoRA's product in fewer passes over memory, on GPUs: what PEFT's layer computes.

PEFT casts the input to the adapter's precision, scales the adapter's output and adds it, each in a
pass over tensors as large as the linear's output. Here the adapter is added in the product itself,
and input and output stay in the precision that they have.
"""

import types
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from ..kernels import passes
from ..quantization.linear import QuantizedLinear


def fuse_lora(model: nn.Module) -> None:
    """Have every LoRA layer over a plain or packed linear take the short way where it can."""
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) in (nn.Linear, QuantizedLinear):
            module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if args or kwargs or not passes.supports(dtype, x.device) or not _is_plain(layer):
        return LoraLinear.forward(layer, x, *args, **kwargs)
    name, rows = layer.active_adapters[0], x.to(dtype).flatten(0, -2)
    # Of rows, as what has the shape of x would be a view, whose gradient is copied again and again.
    out, given = layer.base_layer(rows), layer.lora_dropout[name](rows)
    summed = _WithAdapter.apply(
        out, given, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    )
    return summed.view(*x.shape[:-1], -1)


def _is_plain(layer: Any) -> bool:
    """One adapter is on, not merged, not a variant of LoRA, and its weights are whole."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.disable_adapters or layer.merged:
        return False
    name = layer.active_adapters[0]
    both = layer.lora_A[name], layer.lora_B[name]
    own = name not in layer.lora_variant and not any(part.bias is not None for part in both)
    return own and not any(hasattr(part.weight, "ds_id") for part in both)


class _WithAdapter(torch.autograd.Function):
    """out (T, N), to which scaling * given (T, K) A^T B^T is added; A (R, K), B (N, R)."""

    @staticmethod
    def forward(ctx, out: Tensor, given: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        narrow_a, narrow_b = a.to(given.dtype), b.to(given.dtype)
        inner = given @ narrow_a.T  # (T, R)
        ctx.save_for_backward(given, inner, narrow_a, narrow_b)
        ctx.scaling, ctx.dtypes = scaling, (a.dtype, b.dtype)
        ctx.mark_dirty(out)
        return out.addmm_(inner, narrow_b.T, alpha=scaling)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        given, inner, a, b = ctx.saved_tensors
        of_inner = (gradient @ b).mul_(ctx.scaling)
        of_a = of_inner.T @ given
        of_b = (gradient.T @ inner).mul_(ctx.scaling)
        of_given = of_inner @ a if ctx.needs_input_grad[1] else None
        dtype_a, dtype_b = ctx.dtypes
        return gradient, of_given, of_a.to(dtype_a), of_b.to(dtype_b), None
