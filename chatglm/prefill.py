"""The prompt's pass through the model, for kernels: what forward() computes, in fewer passes.

Beside the products, reading a prompt is memory traffic: turning query and key alone is a dozen
passes over them in plain tensors. Here each layer has seven. Attention goes without a mask where
all rows are of one length, which lets the fast kernels take it: the context sees all of itself, and
what comes after it, usually <sop> alone, sees everything. The last layer is computed for the last
token only.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from .kernels import ops
from .positions import ATTENTION_KERNELS, allowed_keys, position_rows, token_index
from .step_cache import StepCache


def read_prompts(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache: StepCache,
    rotary: tuple[Tensor, Tensor],
    *,
    context_lengths: Tensor,
    mask_positions: Tensor,
) -> Tensor:
    """The last tokens' hidden states (B, C), before the last norm.

    input_ids (B, T), attention_mask (B, T) of prompts padded on the right, None without pads. The
    cache is filled from its beginning, virtual tokens of a prefix first. rotary: cosine and sine
    (positions, D / 2) in fp32. context_lengths, mask_positions (B,).
    """
    transformer = model.transformer
    prefix = _prefix(transformer, len(input_ids), cache.dtype)
    virtual = 0 if prefix is None else prefix.shape[-2]
    index = token_index(input_ids, attention_mask)
    positions = position_rows(index, context_lengths, mask_positions).to(torch.int32).contiguous()
    attend = _Attention(input_ids, attention_mask, context_lengths, virtual)
    lengths = index[:, -1:] + 1
    hidden = transformer.word_embeddings(input_ids)
    last = len(transformer.layers) - 1
    for number, layer in enumerate(transformer.layers):
        normed = layer.input_layernorm(hidden)
        mixed = layer.attention.query_key_value(normed)
        keys, values = cache.room_for_prompt(number, virtual + input_ids.shape[1])
        if prefix is not None:
            keys[:, :, :virtual], values[:, :, :virtual] = prefix[number]
        query = ops.rotate(mixed, positions, keys, values, rotary, offset=virtual)
        if number == last:
            query, normed = _last_of(query.transpose(1, 2), lengths), _last_of(normed, lengths)
            query = query.transpose(1, 2)
        context = attend(query, keys, values)
        cache.keep_prompt(number, keys, values)
        hidden = layer.attention.dense(context.transpose(1, 2).flatten(2))
        hidden = hidden.add_(normed, alpha=layer.alpha)
        normed = layer.post_attention_layernorm(hidden)
        del mixed, query, context, hidden  # what follows takes the most memory
        inner = F.gelu(layer.mlp.dense_h_to_4h(normed), approximate="tanh")
        hidden = layer.mlp.dense_4h_to_h(inner).add_(normed, alpha=layer.alpha)
    return hidden[:, 0]


def _prefix(transformer: Any, rows: int, dtype: torch.dtype) -> Tensor | None:
    """Keys and values of virtual tokens, (layers, 2, B, H, P, D)."""
    if transformer.prefix_encoder is None:
        return None
    return transformer.prefix_encoder(rows, dtype).unflatten(0, (-1, 2))


def _last_of(x: Tensor, lengths: Tensor) -> Tensor:
    """(B, 1, ..) of x (B, T, ..): each row's token number lengths (B, 1) - 1."""
    where = (lengths - 1).view(-1, 1, *[1] * (x.dim() - 2)).expand(-1, 1, *x.shape[2:])
    return x.gather(1, where)


class _Attention:
    """Queries of all tokens, or of the last ones alone, over the filled cache."""

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        context_lengths: Tensor,
        virtual: int,
    ):
        tokens = input_ids.shape[1]
        self.virtual, self.num_keys = virtual, virtual + tokens
        lengths = set(context_lengths.tolist())
        self.context = lengths.pop() if attention_mask is None and len(lengths) == 1 else None
        self.mask = None
        if self.context is None or tokens - self.context > 1:
            self.context = None
            allowed = allowed_keys(
                attention_mask, context_lengths, num_queries=tokens, num_keys=tokens, offset=0
            )
            self.mask = F.pad(allowed, (virtual, 0), value=True)
            self.last = _last_of(
                self.mask.transpose(1, 2), token_index(input_ids, attention_mask)[:, -1:] + 1
            ).transpose(1, 2)

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """query (B, H, T or 1, D); keys, values (B, H, capacity, D)."""
        keys, values = keys[:, :, : self.num_keys], values[:, :, : self.num_keys]
        with sdpa_kernel(ATTENTION_KERNELS):
            if query.shape[2] == 1:
                return F.scaled_dot_product_attention(
                    query, keys, values, attn_mask=None if self.context is not None else self.last
                )
            if self.context is None:
                return F.scaled_dot_product_attention(query, keys, values, attn_mask=self.mask)
            seen = self.virtual + self.context
            parts = [
                F.scaled_dot_product_attention(
                    query[:, :, : self.context], keys[:, :, :seen], values[:, :, :seen]
                ),
                F.scaled_dot_product_attention(query[:, :, self.context :], keys, values),
            ]
            return torch.cat(parts, dim=2)
