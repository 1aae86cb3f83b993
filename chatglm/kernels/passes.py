"""Kernels of whole passes: layer norms, heads of packed sequences, the loss; forward and backward.

B rows, K wide, T tokens in a row of packed sequences, C of them of contexts, S keys of the whole
sequences, H heads, D head width. Everything is fp16 or bf16 on one GPU, and contiguous.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .compiler import get_kernel
from .ops import HEAD_WIDTH, THREADS, reason_against_card
from .products import num_processors

WIDEST_NORM = 8192
"""Of a row, which one block holds in its registers."""


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels run on the device in this precision."""
    return _is_capable(dtype, device) and reason_against_card(device.index) is None


@functools.cache
def _is_capable(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    least = (8, 0) if dtype == torch.bfloat16 else (7, 5)
    return torch.cuda.get_device_capability(device) >= least


def _half(x: Tensor) -> tuple[str, ...]:
    return ("BF16",) if x.dtype == torch.bfloat16 else ()


# ---- layer norm ----


def supports_norm(x: Tensor, norm: Any) -> bool:
    """Whether `layer_norm` takes rows x (.., K) and the norm."""
    width, own = x.shape[-1], (norm.weight.dtype, norm.bias.dtype)
    fits = width % 8 == 0 and width <= WIDEST_NORM and own == (x.dtype, x.dtype)
    return fits and supports(x.dtype, x.device)


def _norm_defines(x: Tensor) -> tuple[str, ...]:
    return (f"WIDTH={x.shape[-1]}", *_half(x))


def layer_norm(
    x: Tensor,
    norm: nn.LayerNorm,
    *,
    residual: Tensor | None = None,
    alpha: float = 1.0,
    out: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    """The norm of rows x (B, K), or of x + alpha * residual, which is put in x's place; (B, K).

    out: may be the residual. stats (B, 2) fp32: mean and 1 / deviation of each row are put there.
    """
    out = torch.empty_like(x) if out is None else out
    defines = _norm_defines(x) + (("RESIDUAL",) if residual is not None else ())
    kernel = get_kernel("layer_norm", x.device.index, defines)
    kernel.launch(
        (x.shape[:-1].numel(), 1, 1),
        THREADS,
        [x, residual, norm.weight, norm.bias, x, out, stats, norm.eps, float(alpha)],
    )
    return out


def layer_norm_backward(
    gradient: Tensor,
    hidden: Tensor,
    stats: Tensor,
    weight: Tensor,
    *,
    carried: Tensor | None,
    alpha: float,
    wants_own: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of hidden (B, K), which was normed, and of the norm's weight and bias (K,) in fp32.

    gradient (B, K): that of what came out, and alpha * carried, if given, is added to it.
    wants_own: the last two are None without it.
    """
    rows, out = len(hidden), torch.empty_like(hidden)
    defines = _norm_defines(hidden) + (("OWN",) if wants_own else ())
    kernel = get_kernel("layer_norm_backward", hidden.device.index, defines)
    blocks = min(rows, 2 * num_processors(hidden.device.index)) if wants_own else rows
    of_own = None
    if wants_own:
        shape = (blocks, 2, hidden.shape[1])
        of_own = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    kernel.launch(
        (blocks, 1, 1),
        THREADS,
        [gradient, carried, hidden, stats, weight, out, of_own, rows, float(alpha)],
    )
    if of_own is None:
        return out, None, None
    return (out, *of_own.sum(0))


# ---- heads of packed sequences ----


@dataclass(frozen=True)
class Turning:
    """What heads are turned and placed by: cosine and sine (positions, D / 2) fp32; positions
    (2, T), places (T,) and context_places (C,) int32 (packed.KeyPlaces)."""

    rotary: tuple[Tensor, Tensor]
    positions: Tensor
    places: Tensor
    context_places: Tensor


def split_heads(
    mixed: Tensor,
    turning: Turning,
    *,
    num_keys: int,
    slots: Tensor | None = None,
    cache: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query (T, H, D), keys and values (S, H, D) out of mixed (T, 3 H D), turned by position.

    num_keys: S; the places of virtual tokens are left as they are. slots (T,) int32, with cache,
    keys and values (pages, H, 64, D): where they go besides, page * 64 + place.
    """
    tokens, heads = len(mixed), mixed.shape[1] // (3 * HEAD_WIDTH)
    query = mixed.new_empty(tokens, heads, HEAD_WIDTH)
    keys, values = mixed.new_empty(2, num_keys, heads, HEAD_WIDTH)
    defines = _half(mixed) + (("PAGED",) if cache is not None else ())
    kernel = get_kernel("split_heads", mixed.device.index, defines)
    kernel.launch(
        (tokens, -(-heads // (THREADS // 32)), 1),
        THREADS,
        [mixed, *turning.rotary, turning.positions, turning.places, query, keys, values, slots,
         *(cache or (None, None)), tokens, heads],
    )  # fmt: skip
    return query, keys, values


def join_heads(
    turning: Turning,
    *,
    of_context_queries: Tensor,
    of_other_queries: Tensor,
    of_keys: tuple[Tensor, Tensor],
    of_context_keys: tuple[Tensor, Tensor],
) -> Tensor:
    """The gradient of mixed (T, 3 H D) out of those of what `split_heads` made of it.

    of_context_queries (C, H, D), of_other_queries (T - C, H, D). of_keys: of keys and values
    (S, H, D). of_context_keys: of contexts' keys and values as contexts see them, (.., H, D).
    """
    in_context, heads = of_context_queries.shape[:2]
    tokens = in_context + len(of_other_queries)
    mixed = of_context_queries.new_empty(tokens, heads * 3 * HEAD_WIDTH)
    kernel = get_kernel("join_heads", mixed.device.index, _half(mixed))
    kernel.launch(
        (tokens, -(-heads // (THREADS // 32)), 1),
        THREADS,
        [of_context_queries, of_other_queries, *of_keys, *of_context_keys, *turning.rotary,
         turning.positions, turning.places, turning.context_places, mixed, tokens, in_context,
         heads],
    )  # fmt: skip
    return mixed


# ---- the loss ----


def cross_entropy_(scores: Tensor, targets: Tensor) -> Tensor:
    """Losses (B,) fp32 of scores (B, V), V a multiple of 8, and targets (B,) int64.

    In place of the scores stands the gradient of the losses' sum then.
    """
    rows, vocabulary = scores.shape
    losses = torch.empty(rows, dtype=torch.float32, device=scores.device)
    if rows:
        kernel = get_kernel("cross_entropy", scores.device.index, _half(scores))
        kernel.launch((rows, 1, 1), 1024, [scores, targets, losses, vocabulary])
    return losses
