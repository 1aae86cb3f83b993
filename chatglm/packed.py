"""Sequences of any lengths side by side in one row: no pads, and none sees another.

    [context 0 | context 1 | ... | answer 0 | answer 1 | ...]        an answer begins at <sop>

All parts of the model but attention look at one token at a time, so the order within the row is
free; in this one the contexts are one stretch and the answers another, which is what attention over
sequences of different lengths wants (packed_attention.py). Positions start again in each sequence,
so every token computes what it would compute in a row of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(eq=False)
class Packed:  # not frozen: Lightning looks into what a batch holds, and refuses frozen classes
    """How N sequences of T tokens together, C of them of contexts, stand in a row.

    sequence, column (T,): of each token, the number of its sequence and its own number in it.
    context_lengths, lengths (N,): tokens of each context, and of each whole sequence. The numbers
    are on the host too, so that nothing waits for the device.
    """

    sequence: Tensor
    column: Tensor
    context_lengths: Tensor
    lengths: Tensor
    num_context_tokens: int
    longest_context: int
    longest_answer: int
    longest: int

    @classmethod
    def of(cls, context_lengths: Sequence[int], lengths: Sequence[int]) -> "Packed":
        """For sequences of these lengths, on the CPU; each has a context, some an answer."""
        assert all(0 < c <= n for c, n in zip(context_lengths, lengths, strict=True))
        contexts, wholes = torch.tensor(context_lengths), torch.tensor(lengths)
        answers, numbers = wholes - contexts, torch.arange(len(lengths))
        sequence, column = [], []
        for parts, first in ((contexts, torch.zeros_like(contexts)), (answers, contexts)):
            number = numbers.repeat_interleave(parts)
            begins = parts.cumsum(0) - parts
            sequence.append(number)
            column.append(torch.arange(len(number)) + (first - begins)[number])
        return cls(
            torch.cat(sequence),
            torch.cat(column),
            contexts,
            wholes,
            num_context_tokens=int(contexts.sum()),
            longest_context=int(contexts.max()),
            longest_answer=int(answers.max()),
            longest=int(wholes.max()),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Packed":
        """The same with its tensors on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: Any = {n: send(v, device) for n, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def row(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        """The values of all sequences, one a token, as they stand in the row, (T,) int64."""
        cuts = list(zip(sequences, self.context_lengths.tolist(), strict=True))
        parts = [s[:c] for s, c in cuts] + [s[c:] for s, c in cuts]
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    @property
    def positions(self) -> Tensor:
        """The two position rows (2, T) of all tokens; see positions.position_rows."""
        context = self.context_lengths[self.sequence]
        text = torch.minimum(self.column, context - 1)  # from <sop> on, that of [gMASK]
        return torch.stack((text, (self.column - context + 1).clamp(min=0)))


@dataclass(frozen=True, eq=False)
class KeyPlaces:
    """Where keys stand among those of whole sequences one after the other, S of them, and among
    those of contexts; P virtual tokens stand before each sequence's own in both.

    places (T,), context_places (C,) int32: of the row's tokens. of_contexts (C + N P,): which keys
    of whole sequences are contexts'. virtual, virtual_of_contexts (N, P). ends, context_ends,
    answer_ends (N + 1,) int32: the first is 0, then where each sequence's end.
    """

    places: Tensor
    context_places: Tensor
    of_contexts: Tensor
    virtual: Tensor
    virtual_of_contexts: Tensor
    ends: Tensor
    context_ends: Tensor
    answer_ends: Tensor
    num_keys: int
    longest: int
    longest_context: int

    @classmethod
    def of(cls, packed: Packed, num_virtual: int = 0) -> "KeyPlaces":
        """On the device of the packed tensors, which nothing waits for."""
        lengths, contexts = packed.lengths, packed.context_lengths
        count, in_context = len(lengths), packed.num_context_tokens
        ends, context_ends = _ends(lengths + num_virtual), _ends(contexts + num_virtual)
        places = ends[packed.sequence] + packed.column + num_virtual
        context_places = (
            context_ends[packed.sequence[:in_context]] + packed.column[:in_context] + num_virtual
        )
        each = torch.arange(num_virtual, device=lengths.device)
        virtual, virtual_of_contexts = ends[:-1, None] + each, context_ends[:-1, None] + each
        of_contexts = places.new_empty(in_context + count * num_virtual)
        of_contexts[context_places] = places[:in_context]
        of_contexts[virtual_of_contexts] = virtual
        return cls(
            places.int(),
            context_places.int(),
            of_contexts,
            virtual,
            virtual_of_contexts,
            ends.int(),
            context_ends.int(),
            _ends(lengths - contexts).int(),
            num_keys=len(packed.sequence) + count * num_virtual,
            longest=packed.longest + num_virtual,
            longest_context=packed.longest_context + num_virtual,
        )


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device, without waiting for what runs there."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _ends(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0))
