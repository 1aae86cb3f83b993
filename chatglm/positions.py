"""Mask and 2-D positions of a GLM sequence, from the length of its context.

    prompt ... [gMASK] <sop> answer ... <eop>
    |-- context, c --|

The context sees all of itself, in both directions; from <sop> on the mask is causal. Training,
generation and serving all come here. Everything is tensor arithmetic on the device: nothing is
read back to the host, and a row's result does not depend on the other rows.

Searching token ids happens once a sequence (`find_context`); later steps carry the two numbers.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

ATTENTION_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN's: it plans anew for every key length, 2 ms a layer and token on an H100."""


def find_context(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    bos_token_id: int,
    gmask_token_id: int,
    mask_token_id: int,
) -> tuple[Tensor, Tensor]:
    """Context length and mask position of each row, both (B,), counted in real tokens.

    input_ids (B, T); attention_mask (B, T), 1 for real tokens, or None when there are no pads.
    The context ends at the first <sop>; a row without one is causal throughout (length 0). The
    mask position is that of the first [gMASK], else of the first [MASK], else of the last context
    token.
    """
    index = token_index(input_ids, attention_mask)

    def first(token_id: int) -> tuple[Tensor, Tensor]:
        hits = input_ids == token_id
        column = hits.int().argmax(dim=1, keepdim=True)
        return hits.any(dim=1), index.gather(1, column).squeeze(1)

    has_bos, bos_at = first(bos_token_id)
    has_gmask, gmask_at = first(gmask_token_id)
    has_mask, mask_at = first(mask_token_id)
    context_lengths = torch.where(has_bos, bos_at, 0)
    fallback = torch.where(has_mask, mask_at, (context_lengths - 1).clamp(min=0))
    return context_lengths, torch.where(has_gmask, gmask_at, fallback)


def token_index(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Number of real tokens before each one, (B, T); pads count as position 0."""
    if attention_mask is None:
        length = input_ids.shape[1]
        return torch.arange(length, device=input_ids.device).expand(input_ids.shape[0], length)
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def position_rows(index: Tensor, context_lengths: Tensor, mask_positions: Tensor) -> Tensor:
    """The model's position_ids (B, 2, T) from the token index (B, T).

    Row 0: the index in the context, then constantly the mask position. Row 1: 0 in the context,
    then 1, 2, 3 ... from <sop> on.
    """
    context = context_lengths[:, None]
    text = torch.where(index < context, index, mask_positions[:, None])
    return torch.stack((text, (index - context + 1).clamp(min=0)), dim=1)


def allowed_keys(
    attention_mask: Tensor | None,
    context_lengths: Tensor,
    *,
    num_queries: int,
    num_keys: int,
    offset: int | Tensor,
) -> Tensor:
    """Which keys each query may see, (B, 1, T, S) bool, True = may be seen.

    offset: tokens already in the cache, so query t stands in column offset + t. attention_mask
    (B, offset + T) has 1 for real tokens. Columns that are not filled yet (static caches) are
    forbidden; every query sees itself, so that a pad's softmax is never empty.
    """
    device = context_lengths.device
    columns = torch.arange(num_keys, device=device)
    rows = torch.arange(num_queries, device=device)[:, None] + offset
    if attention_mask is None:
        index, real = columns[None], None
    else:
        padding = num_keys - attention_mask.shape[1]
        real = torch.nn.functional.pad(attention_mask.bool(), (0, padding))
        index = real.long().cumsum(dim=1) - 1
    in_context = index[:, None] < context_lengths[:, None, None]
    allowed = in_context & (columns < offset + num_queries) | (columns <= rows)
    if real is not None:
        allowed = allowed & real[:, None] | (columns == rows)
    return allowed[:, None]


def mask_from_released(attention_mask: Tensor) -> Tensor:
    """(B, T) with 1 for real tokens, from the released tokenizer's (B, 1, T, T), True = forbidden.

    The last token sees every real token before it, so its row is the list of pads.
    """
    return (~attention_mask[:, 0, -1]).long()
