"""Attention of packed sequences: contexts to themselves, answers to all that stands before them.

On a GPU two calls of flash attention (Dao 2023) over sequences of different lengths: every context
to its own keys, in both directions; every answer to the keys of its whole sequence, causally from
their end. Neither a pad nor a mask is ever made. Where that kernel does not run, the heads are put
into padded rows and go the way of padded batches, with their mask.

The calls are torch's operators and not torch.nn.attention.varlen_attn: the whole is one function to
autograd, which keeps query, keys, values and what comes out, and nothing twice.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from .kernels import passes
from .packed import KeyPlaces, Packed
from .positions import ATTENTION_KERNELS, allowed_keys
from .prefix import own_gradient
from .rotary import apply_rotary, rotary_for_positions, rotary_tables

logger = logging.getLogger("chatglm")

_flash: Any = torch.ops.aten._flash_attention_forward.default
_flash_backward: Any = torch.ops.aten._flash_attention_backward.default


class PackedAttention:
    """Of the sequences of one forward pass; what all layers share is made once."""

    def __init__(
        self,
        packed: Packed,
        config: Any,
        *,
        half: bool,
        dtype: torch.dtype,
        is_fused: bool = True,
    ):
        """config: the model's. half: rotary tables as in fp16 (rotary.py). dtype: of the heads.
        is_fused: by kernels, where they run."""
        self.packed, self.num_heads = packed, config.num_attention_heads
        self.num_virtual: int = config.pre_seq_len or 0
        max_length, head_width = config.max_sequence_length, config.head_width
        device = packed.lengths.device
        reason = _reason_against_flash(head_width, dtype, device) if is_fused else "as was asked"
        self.is_fused = reason is None
        positions = packed.positions
        if self.is_fused:
            self.places = KeyPlaces.of(packed, self.num_virtual)
            tables = rotary_tables(max_length, head_width // 2, half=half, device=device)
            self.turning = passes.Turning(
                tables,  # their second halves repeat the first: the kernels read these alone
                positions.int().contiguous(),
                self.places.places,
                self.places.context_places,
            )
            return
        angles = rotary_for_positions(
            positions[None], max_length=max_length, head_width=head_width, half=half
        )
        self.rotary = tuple(angle[0, 0][:, None] for angle in angles)  # (T, 1, D)
        self.padding = _Padding.of(packed, self.num_virtual)

    def __call__(self, mixed: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
        """mixed (1, T, 3 H D), query, key and value per head, to (1, T, H D).

        prefix: keys and values of virtual tokens, each (N, H, P, D).
        """
        rows = mixed.flatten(0, 1)  # not mixed[0], whose gradient is copied into one of zeros
        if self.is_fused:
            parts = (None, None) if prefix is None else tuple(x.transpose(1, 2) for x in prefix)
            return _Flash.apply(rows.contiguous(), *parts, self).flatten(1)[None]
        return self.padding.attend(*self._plain_heads(rows), prefix).flatten(1)[None]

    def read(
        self,
        mixed: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
        cache: tuple[Tensor, Tensor],
        *,
        slots: Tensor,
        keys_alone: bool = False,
    ) -> Tensor | None:
        """The same without a gradient, (T, 3 H D) to (T, H D), and into a cache's pages.

        cache: keys and values (pages, H, 64, D), of which the tokens get the slots (T,) int32, page
        * 64 + place. keys_alone: they are all that is wanted.
        """
        if not self.is_fused:
            query, keys, values = self._plain_heads(mixed)
            for stored, new in zip(cache, (keys, values), strict=True):
                stored[slots // stored.shape[2], :, slots % stored.shape[2]] = new
            if keys_alone:
                return None
            return self.padding.attend(query, keys, values, prefix).flatten(1)
        places = self.places
        query, keys, values = passes.split_heads(
            mixed, self.turning, num_keys=places.num_keys, slots=slots, cache=cache
        )
        if keys_alone:
            return None
        if prefix is not None:
            keys[places.virtual], values[places.virtual] = (x.transpose(1, 2) for x in prefix)
        return _attend(self, query, keys, values)[0].flatten(1)

    def _plain_heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, keys and values (T, H, D), the first two turned."""
        query, keys, values = mixed.unflatten(-1, (self.num_heads, -1)).chunk(3, dim=-1)
        return apply_rotary(query, *self.rotary), apply_rotary(keys, *self.rotary), values


@functools.cache
def _reason_against_flash(head_width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why attention goes by padded rows, or None where it does not; on a GPU it is said once."""
    if device.type != "cuda":
        return "no GPU"
    reason = None
    if head_width != passes.HEAD_WIDTH:
        reason = f"the heads are {head_width} wide and not {passes.HEAD_WIDTH}"
    elif dtype == torch.float32:
        reason = "it is reckoned in 32 bits"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reason = "flash attention needs a card of compute capability 8.0 or later"
    elif not torch.backends.cuda.is_flash_attention_available():
        reason = "this torch has no flash attention"
    elif not passes.supports(dtype, device):
        reason = "the kernels that split its heads do not run"
    if reason is not None:
        logger.warning("attention of packed samples goes by padded rows, and slower: %s", reason)
    return reason


class _Flash(torch.autograd.Function):
    """mixed (T, 3 H D), virtual keys and values (N, P, H, D) or None, to (T, H, D)."""

    @staticmethod
    def forward(ctx, mixed, virtual_keys, virtual_values, attention: PackedAttention) -> Tensor:
        assert attention.packed.longest_answer > 0  # the backward pass is of both calls
        places = attention.places
        query, keys, values = passes.split_heads(mixed, attention.turning, num_keys=places.num_keys)
        if virtual_keys is not None:
            keys[places.virtual], values[places.virtual] = virtual_keys, virtual_values
        out, sums, ctx.random = _attend(attention, query, keys, values)
        ctx.attention = attention
        ctx.save_for_backward(query, keys, values, out, *sums)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        attention, random = ctx.attention, ctx.random
        query, keys, values, out, *sums = ctx.saved_tensors
        places, in_context = attention.places, attention.packed.num_context_tokens
        of_contexts = _of_contexts(attention, keys, values)
        gradient = gradient.contiguous()
        first, second = slice(None, in_context), slice(in_context, None)
        found = []
        for number, (part, own, lengths) in enumerate(
            (
                (first, of_contexts, _lengths_of_contexts(attention)),
                (second, (keys, values), _lengths_of_answers(attention)),
            )
        ):
            found.append(_flash_backward(
                gradient[part], query[part], *own, out[part], sums[number], *lengths, 0.0,
                number == 1, *random[number], scale=query.shape[-1] ** -0.5,
            ))  # fmt: skip
        (of_queries, *of_context_keys), (of_others, *of_keys) = found
        of_mixed = passes.join_heads(
            attention.turning,
            of_context_queries=of_queries,
            of_other_queries=of_others,
            of_keys=tuple(of_keys),
            of_context_keys=tuple(of_context_keys),
        )
        of_virtual = [None, None]
        if attention.num_virtual:
            of_virtual = [
                whole[places.virtual] + context[places.virtual_of_contexts]
                for whole, context in zip(of_keys, of_context_keys, strict=True)
            ]
        return of_mixed, *of_virtual, None


def _attend(
    attention: PackedAttention, query: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Any, ...]]:
    """(T, H, D) of the row's queries, and of the two calls what the backward pass wants, if there
    are two: where no sequence has an answer there is one, and no backward pass."""
    in_context, scale = attention.packed.num_context_tokens, query.shape[-1] ** -0.5
    has_answers = attention.packed.longest_answer > 0
    of_contexts = _of_contexts(attention, keys, values) if has_answers else (keys, values)
    first = _flash(query[:in_context], *of_contexts, *_lengths_of_contexts(attention), 0.0,
                   False, False, scale=scale)  # fmt: skip
    if not has_answers:
        return first[0], (first[1],), (first[2:4],)
    second = _flash(query[in_context:], keys, values, *_lengths_of_answers(attention), 0.0,
                    True, False, scale=scale)  # fmt: skip
    out = torch.cat((first[0], second[0]))
    return out, (first[1], second[1]), (first[2:4], second[2:4])


def _of_contexts(attention: PackedAttention, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The contexts' keys and values among those of whole sequences."""
    if len(attention.packed.lengths) == 1:  # the whole begins with them
        longest = attention.places.longest_context
        return keys[:longest], values[:longest]
    which = attention.places.of_contexts
    return keys.index_select(0, which), values.index_select(0, which)


def _lengths_of_contexts(attention: PackedAttention) -> tuple[Tensor, Tensor, int, int]:
    """Ends and longest of queries and keys, as flash attention takes them."""
    places, packed = attention.places, attention.packed
    queries = places.context_ends
    if attention.num_virtual:
        before = torch.arange(len(queries), device=queries.device, dtype=torch.int32)
        queries = queries - attention.num_virtual * before
    return queries, places.context_ends, packed.longest_context, places.longest_context


def _lengths_of_answers(attention: PackedAttention) -> tuple[Tensor, Tensor, int, int]:
    places = attention.places
    return places.answer_ends, places.ends, attention.packed.longest_answer, places.longest


@dataclass(frozen=True)
class _Padding:
    """Padded rows (N, longest) of the sequences: where each token stands, and who sees whom.

    mask (N, 1, longest, P + longest), True where a key may be seen.
    """

    packed: Packed
    mask: Tensor

    @classmethod
    def of(cls, packed: Packed, num_virtual: int) -> "_Padding":
        columns = torch.arange(packed.longest, device=packed.lengths.device)
        real = (columns < packed.lengths[:, None]).long()
        mask = allowed_keys(
            real,
            packed.context_lengths,
            num_queries=packed.longest,
            num_keys=packed.longest,
            offset=0,
        )
        return cls(packed, F.pad(mask, (num_virtual, 0), value=True))

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, prefix: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """(T, H, D) each, to (T, H, D)."""
        q, k, v = (self._padded(x) for x in (query, keys, values))
        if prefix is not None:
            k, v = (
                torch.cat((own_gradient(p), x), dim=2) for p, x in zip(prefix, (k, v), strict=True)
            )
        with sdpa_kernel(ATTENTION_KERNELS):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return out.transpose(1, 2)[self.packed.sequence, self.packed.column]

    def _padded(self, x: Tensor) -> Tensor:
        """(T, H, D) to (N, H, longest, D)."""
        rows = x.new_zeros(len(self.packed.lengths), self.packed.longest, *x.shape[1:])
        rows = rows.index_put((self.packed.sequence, self.packed.column), x)
        return rows.transpose(1, 2)
