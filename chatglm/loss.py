"""The language-model loss: the shift of the labels is written here and nowhere else.

The logits at t predict the label at t + 1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .kernels import passes

IGNORE = -100
"""Label of a token that is read but not learned."""

CHUNK = 256
"""Tokens whose logits exist at one time in `chunked_loss`: 133 MB in fp32 at 130528 rows."""

FUSED_CHUNK = 512
"""The same where a kernel puts their gradients in their place: 134 MB in half precision."""


def next_token_loss(
    logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | float | None = None
) -> Tensor:
    """Mean cross entropy, in fp32, over the labels that are not -100; a scalar.

    logits (B, T, V), labels (B, T). num_items_in_batch: what the sum is divided by instead of the
    number of those labels, for a mean over several batches (transformers' name for it).
    """
    predicted, expected = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
    if num_items_in_batch is None:
        return F.cross_entropy(predicted, expected, ignore_index=IGNORE)
    total = F.cross_entropy(predicted, expected, ignore_index=IGNORE, reduction="sum")
    return total / num_items_in_batch


def learned_tokens(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of labels (B, T): which tokens of all rows predict the learned ones, and these, each (N,).

    On the CPU it is done before the labels are sent to a GPU, which nothing then waits for.
    """
    expected = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
    places = (expected != IGNORE).nonzero()[:, 0]
    return places, expected[places]


def chunked_loss(
    hidden: Tensor,
    learned: tuple[Tensor, Tensor],
    head: nn.Module,
    num_items_in_batch: Tensor | float | None = None,
    *,
    chunk: int = CHUNK,
    is_fused: bool = True,
) -> Tensor:
    """`next_token_loss` of head(hidden) without ever holding all logits; a scalar.

    Only the learned positions reach the head, `chunk` at a time, and the backward pass computes
    their logits again: all logits of 4 x 1024 tokens would be 2.1 GB in fp32, three times over. On
    a GPU their gradient is computed beside the loss instead, as it does not depend on what comes
    later, and none are computed again. hidden (B, T, C), learned: of the labels, as
    `learned_tokens` gives them.
    """
    places, targets = learned
    rows = hidden.flatten(0, 1).index_select(0, places)  # (N, C)
    if is_fused and _is_fusible(head, rows):
        total = _FusedLoss.apply(rows, targets, head.weight, torch.is_grad_enabled())
    else:
        total = hidden.new_zeros((), dtype=torch.float32) + 0 * rows.sum().float()
        for part, target in zip(rows.split(chunk), targets.split(chunk), strict=True):
            total = total + checkpoint(_summed, head, part, target, use_reentrant=False)
    count = max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch
    return total / count


def _summed(head: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(rows).float(), targets, reduction="sum")


def _is_fusible(head: Any, rows: Tensor) -> bool:
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    weight = head.weight
    if weight.requires_grad and rows.dtype == torch.float16:
        return False  # its gradient is summed before it is scaled, and could overflow
    if hasattr(weight, "ds_id") or hasattr(head, "_hf_hook"):
        return False  # it is only whole, or here, in a call of its own
    same = (weight.dtype, weight.device) == (rows.dtype, rows.device)
    return same and head.out_features % 8 == 0 and passes.supports(rows.dtype, rows.device)


class _FusedLoss(torch.autograd.Function):
    """The sum of the losses of rows (N, C) under a head (V, C), and at once its gradients.

    wants_gradients: False where none will be asked for, which autograd does not tell. A trained
    head's gradient is scaled in its place, so there is one backward pass.
    """

    @staticmethod
    def forward(
        ctx, rows: Tensor, targets: Tensor, weight: Tensor, wants_gradients: bool
    ) -> Tensor:
        for_rows, for_weight = (wants_gradients and ctx.needs_input_grad[i] for i in (0, 2))
        of_rows = torch.empty_like(rows) if for_rows else None
        of_weight = torch.zeros_like(weight) if for_weight else None
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        for start in range(0, len(rows), FUSED_CHUNK):
            some = slice(start, start + FUSED_CHUNK)
            scores = rows[some] @ weight.T
            total += passes.cross_entropy_(scores, targets[some]).sum()
            if of_rows is not None:
                torch.mm(scores, weight, out=of_rows[some])
            if of_weight is not None:
                of_weight.addmm_(scores.T, rows[some])
        ctx.save_for_backward(of_rows, of_weight)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        of_rows, of_weight = ctx.saved_tensors
        return (
            None if of_rows is None else of_rows * gradient,
            None,
            None if of_weight is None else of_weight.mul_(gradient),  # as large as the head
            None,
        )
