"""The halves of a block in fewer passes over memory, on GPUs.

Norm and residual are one kernel each way. The residual leaves after its norm, times alpha: it is
`carried`, unscaled, to where it is added, and so is its gradient on the way back, which the norm's
kernel scales where it adds the two up. The products, and with them adapters and quantised weights,
are called as they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .kernels import passes


def supports(norm: nn.Module, hidden: Tensor) -> bool:
    """Whether `half_block` takes a half of a block that begins with this norm."""
    return torch.is_grad_enabled() and supports_norm(norm, hidden)


def supports_norm(norm: nn.Module, hidden: Tensor) -> bool:
    """Whether `layer_norm` takes the norm; ZeRO-3 and accelerate's offloading have the weights of
    one only in its own call."""
    if not (hidden.is_cuda and getattr(norm, "is_fused", False)) or torch.compiler.is_compiling():
        return False
    if hasattr(norm.weight, "ds_id") or hasattr(norm, "_hf_hook"):
        return False
    return norm.weight.device == hidden.device and passes.supports_norm(hidden, norm)


def half_block(
    hidden: Tensor, norm: Any, branch: Callable[[Tensor], Tensor], alpha: float
) -> Tensor:
    """alpha * normed + branch(normed) of hidden (.., C), normed first."""
    normed, carried = _normed(hidden, norm, alpha)
    return _Sum.apply(branch(normed), carried, alpha)


def layer_norm(hidden: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The norm alone, (.., K) to (.., K)."""
    if not torch.is_grad_enabled():
        return passes.layer_norm(hidden.contiguous(), norm)
    return _normed(hidden, norm, 0.0)[0]


def _normed(hidden: Tensor, norm: nn.LayerNorm, alpha: float) -> tuple[Tensor, Tensor]:
    normed, carried, _ = _Norm.apply(hidden, norm.weight, norm.bias, norm, alpha)
    return normed, carried


class _Norm(torch.autograd.Function):
    """hidden (.., K) to its normed self, for the branch, and the same to be carried past it."""

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, bias: Tensor, norm: nn.LayerNorm, alpha: float):
        rows = hidden.contiguous().flatten(0, -2)
        stats = torch.empty(len(rows), 2, dtype=torch.float32, device=rows.device)
        normed = passes.layer_norm(rows, norm, stats=stats).view(hidden.shape)
        return normed, normed.view_as(normed), stats

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        hidden, weight, _, _, ctx.alpha = inputs
        ctx.save_for_backward(hidden, weight, output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        gradient, carried, _ = gradients
        hidden, weight, stats = ctx.saved_tensors
        assert gradient is not None
        rows, shape = hidden.contiguous().flatten(0, -2), hidden.shape
        wants_own = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        of_hidden, of_weight, of_bias = passes.layer_norm_backward(
            gradient.contiguous().view(rows.shape),
            rows,
            stats,
            weight,
            carried=None if carried is None else carried.contiguous().view(rows.shape),
            alpha=ctx.alpha,
            wants_own=wants_own,
        )
        if of_weight is not None and of_bias is not None:
            of_weight, of_bias = of_weight.to(weight.dtype), of_bias.to(weight.dtype)
        return of_hidden.view(shape), of_weight, of_bias, None, None


class _Sum(torch.autograd.Function):
    """branch + alpha * carried; what is carried has its gradient scaled by the norm before."""

    @staticmethod
    def forward(branch: Tensor, carried: Tensor, alpha: float) -> Tensor:
        return torch.add(branch, carried, alpha=alpha)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, gradient, None
