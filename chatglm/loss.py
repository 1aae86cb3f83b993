"""The language-model loss: the shift of the labels is written here and nowhere else.

The logits at t predict the label at t + 1.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100
"""Label of a token that is read but not learned."""

CHUNK = 256
"""Tokens whose logits exist at one time in `chunked_loss`: 133 MB in fp32 at 130528 rows."""


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


def chunked_loss(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    num_items_in_batch: Tensor | float | None = None,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """`next_token_loss` of head(hidden) without ever holding all logits; a scalar.

    Only the learned positions reach the head, `chunk` at a time, and the backward pass computes
    their logits again: all logits of 4 x 1024 tokens would be 2.1 GB in fp32, three times over.
    hidden (B, T, C), labels (B, T).
    """
    expected = labels[:, 1:]
    learned = expected != IGNORE
    rows, targets = hidden[:, :-1][learned], expected[learned]  # (N, C), (N,)
    total = hidden.new_zeros((), dtype=torch.float32) + 0 * rows.sum().float()
    for part, target in zip(rows.split(chunk), targets.split(chunk), strict=True):
        total = total + checkpoint(_summed, head, part, target, use_reentrant=False)
    count = max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch
    return total / count


def _summed(head: Callable[[Tensor], Tensor], rows: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(rows).float(), targets, reduction="sum")
