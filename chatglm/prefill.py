"""The prompts' pass through the model, for kernels: what forward() computes, in fewer passes.

Beside the products, reading a prompt is memory traffic: turning query and key alone is a dozen
passes over them in plain tensors. Here each layer has a few. Rows of one length go without a mask,
which lets the fast kernels take their attention: the context sees all of itself, and what comes
after it, usually <sop> alone, sees everything. The last layer is computed for the last tokens only.

Prompts of many lengths that go into pages are read side by side in one row instead, without pads,
and up to their last tokens, each of which takes a step with those of the rows that run: of the last
layer nothing is computed but keys and values.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from .kernels import ops, passes, products
from .packed import Packed
from .packed_attention import PackedAttention
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
    """The last tokens' hidden states (B, C), after the last norm.

    input_ids (B, T), attention_mask (B, T) of prompts padded on the right, None without pads. The
    cache is filled from its beginning, virtual tokens of a prefix first. rotary: cosine and sine
    (positions, D / 2) in fp32. context_lengths, mask_positions (B,).
    """
    prefix = _prefix(model.transformer, len(input_ids), cache.dtype)
    virtual = 0 if prefix is None else prefix.shape[-2]
    index = token_index(input_ids, attention_mask)
    positions = position_rows(index, context_lengths, mask_positions).to(torch.int32).contiguous()
    attend = _Attention(input_ids, attention_mask, context_lengths, virtual)
    lengths = index[:, -1:] + 1

    def attention(number: int, mixed: Tensor, only_last: bool) -> Tensor:
        keys, values = cache.room_for_prompt(number, virtual + input_ids.shape[1])
        if prefix is not None:
            keys[:, :, :virtual], values[:, :, :virtual] = prefix[number]
        query = ops.rotate(mixed, positions, keys, values, rotary, offset=virtual)
        if only_last:
            query = _last_of(query.transpose(1, 2), lengths).transpose(1, 2)
        context = attend(query, keys, values)
        cache.keep_prompt(number, keys, values)
        return context.transpose(1, 2).flatten(2)

    hidden = model.transformer.word_embeddings(input_ids)
    found = _through(model.transformer, hidden, attention, lambda x: _last_of(x, lengths))
    assert found is not None
    return found[:, 0]


class Beside(Protocol):
    """Tokens that pass through the model beside prompts, each the next of a sequence."""

    hidden: Tensor
    """(B, C), their embeddings."""

    def attend(self, number: int, mixed: Tensor, *, keys_are_new: bool) -> Tensor:
        """In a layer, (B, H D) of their query, key and value (B, 3 H D); see ops.attention."""


def read_packed(
    model: Any,
    input_ids: Tensor,
    packed: Packed,
    pages: Callable[[int], tuple[Tensor, Tensor]],
    *,
    slots: Tensor,
    virtual_slots: Tensor,
    beside: "Beside | None" = None,
) -> Tensor | None:
    """Puts the keys and values of N sequences' tokens, in one row (T,), into pages.

    pages: of a layer, keys and values (pages, H, 64, D). slots (T,), virtual_slots (N, P) int32:
    page * 64 + place of each token and virtual token. beside: B other tokens, which may see those;
    gives their hidden states (B, C) after the last norm. The model's `row_adapters` know of all
    T + B tokens.
    """
    transformer = model.transformer
    prefix = _prefix(transformer, len(packed.lengths), transformer.dtype)
    attend = PackedAttention(
        packed,
        model.config,
        half=transformer.dtype != torch.float32,
        dtype=transformer.dtype,
    )
    num_tokens, hidden = len(input_ids), transformer.word_embeddings(input_ids)
    if beside is not None:
        hidden = torch.cat((hidden, beside.hidden))

    def attention(number: int, mixed: Tensor, is_last: bool) -> Tensor | None:
        before = None
        if prefix is not None:
            before = prefix[number, 0], prefix[number, 1]  # each (N, H, P, D)
            for stored, new in zip(pages(number), before, strict=True):
                places = virtual_slots // stored.shape[2], virtual_slots % stored.shape[2]
                stored[places[0], :, places[1]] = new.transpose(1, 2)
        context = attend.read(
            mixed[:num_tokens], before, pages(number), slots=slots, keys_alone=is_last
        )
        if beside is None:
            return context
        own = beside.attend(number, mixed[num_tokens:], keys_are_new=True)
        return own if context is None else torch.cat((context, own))

    def own_of(x: Tensor) -> Tensor:
        adapters = getattr(model, "row_adapters", None)
        if adapters is not None and adapters.index is not None:  # of each token so far
            adapters.index = adapters.index[num_tokens:]
        return x[num_tokens:]

    return _through(transformer, hidden, attention, own_of)


def _through(
    transformer: Any,
    hidden: Tensor,
    attention: Callable[[int, Tensor, bool], Tensor | None],
    some_of: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """The blocks and the last norm; in the last block, some tokens alone after attention.

    attention: of a layer's number, its query, key and value, and whether it is the last; None: what
    was wanted is done.
    """
    layers = transformer.layers
    normed = layers[0].input_layernorm(hidden)
    for number, layer in enumerate(layers):
        is_last = number == len(layers) - 1
        mixed = layer.attention.query_key_value(normed)
        context = attention(number, mixed, is_last)
        if context is None:
            return None
        normed = some_of(normed) if is_last else normed
        branch = layer.attention.dense(context)
        del mixed, context, hidden  # what follows takes the most memory
        normed = _next_norm(branch, normed, layer.alpha, layer.post_attention_layernorm)
        del branch
        hidden = layer.mlp.dense_4h_to_h(_inner(normed, layer.mlp.dense_h_to_4h))
        following = transformer.final_layernorm if is_last else layers[number + 1].input_layernorm
        normed = _next_norm(hidden, normed, layer.alpha, following)
    return normed


def _inner(normed: Tensor, linear: nn.Module) -> Tensor:
    if type(linear) is nn.Linear and linear.bias is not None:
        return products.library_gelu(normed, linear)
    return F.gelu(linear(normed), approximate="tanh")


def _next_norm(branch: Tensor, normed: Tensor, alpha: float, norm: nn.LayerNorm) -> Tensor:
    """The norm of branch + alpha * normed; both are written over."""
    if passes.supports_norm(branch, norm):
        return passes.layer_norm(branch, norm, residual=normed, alpha=alpha, out=normed)
    return norm(branch.add_(normed, alpha=alpha))


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
