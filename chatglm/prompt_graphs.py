"""Prompts that are to be read into pages, and their pass as a CUDA graph.

A prompt is read up to its last token, <sop>, which takes a step of its row (batch_step.py). Its
pass is some hundreds of launches, which cost the host twice the time that the GPU takes for them.
So there is a graph for each number of tokens, in steps of SIZE_STEP: beside the prompts in the row
stand sequences of pads that fill the step. Answers that are read again, and prompts for which no
graph is large enough, go without one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .capture import capture
from .packed import Packed, send
from .paged_cache import PAGE_TOKENS, padded
from .sampling import Sampling

SIZE_STEP = 128
LEAST_PADS = 1
"""Of a sequence that is not there."""
SCRATCH_PAGE = 0
"""Whatever is written for places without a row, and for pads, goes there."""


@dataclass(frozen=True)
class Joining:
    """A row that joins: its prompt, which ids begins with, and its answer so far."""

    ids: list[int]
    prompt_length: int
    pages: list[int]
    sampling: Sampling
    seed: int
    adapter: int = 0

    @property
    def is_new(self) -> bool:
        """Whether it has no answer yet."""
        return len(self.ids) == self.prompt_length

    @property
    def read_ids(self) -> list[int]:
        """Up to the last, with which its first step begins."""
        return self.ids[:-1]


@dataclass(frozen=True, eq=False)
class Prompts:
    """N prompts in one row of T tokens, with P virtual tokens before each in the cache.

    ids (T,). slots (T,), virtual_slots (N, P) int32: page * PAGE_TOKENS + place. adapters (T,): of
    each token; None if there are none, or all have the bare weights.
    """

    ids: Tensor
    packed: Packed
    slots: Tensor
    virtual_slots: Tensor
    adapters: Tensor | None

    @classmethod
    def of(cls, joining: Sequence[Joining], *, num_virtual: int, has_adapters: bool) -> "Prompts":
        """On the CPU."""
        contexts = [one.prompt_length - 1 for one in joining]  # up to <sop>
        packed = Packed.of(contexts, [len(one.read_ids) for one in joining])
        table, before = padded([one.pages for one in joining], torch.device("cpu")), num_virtual
        return cls(
            packed.row([one.read_ids for one in joining]),
            packed,
            _slots(table, packed.sequence, packed.column + before),
            _slots(table, torch.arange(len(joining))[:, None], torch.arange(before)),
            torch.tensor([one.adapter for one in joining])[packed.sequence]
            if has_adapters
            else None,
        )

    def to(self, device: torch.device) -> "Prompts":
        """The same on a device."""
        ids, slots, virtual = (send(x, device) for x in (self.ids, self.slots, self.virtual_slots))
        adapters = None if self.adapters is None else send(self.adapters, device)
        return Prompts(ids, self.packed.to(device), slots, virtual, adapters)

    def copy_(self, other: "Prompts") -> None:
        """The other's values in the tensors of this one."""
        for own, new in zip(self._tensors(), other._tensors(), strict=True):
            own.copy_(send(new, own.device))

    def _tensors(self) -> list[Tensor]:
        every = [*vars(self).values(), *vars(self.packed).values()]
        return [value for value in every if isinstance(value, Tensor)]


def _slots(table: Tensor, sequences: Tensor, columns: Tensor) -> Tensor:
    pages = table[sequences, columns // PAGE_TOKENS]
    return (pages * PAGE_TOKENS + columns % PAGE_TOKENS).int()


def pads_alone(config: Any, number: int) -> Joining:
    """A prompt of so many tokens to be read, which say nothing."""
    pages = [SCRATCH_PAGE] * -(-((config.pre_seq_len or 0) + number) // PAGE_TOKENS)
    ids = [config.pad_token_id] * (number + 1)
    return Joining(ids, len(ids), pages, Sampling(), seed=0)


class PromptGraphs:
    """Passes over 1 to most_prompts new prompts, a graph for each number of tokens."""

    def __init__(
        self,
        model: Any,
        work: Callable[[Prompts], object],
        *,
        most_prompts: int,
        num_beside: int,
        pool: Any,
    ):
        """work: the pass. num_beside: other rows that the model's products have in it. pool: see
        new_pool."""
        self._config, self.device = model.config, model.device
        self._work, self._pool = work, pool
        self._num_sequences, self._num_beside = most_prompts + 1, num_beside
        self._has_adapters = hasattr(model, "row_adapters")
        self._graphs: dict[int, tuple[Prompts, Any]] = {}

    def warm_up(self) -> None:
        """Capture all graphs; whatever the work changes is changed."""
        first = LEAST_PADS * self._num_sequences
        tokens = range(first, first + self._config.max_sequence_length)
        sizes = {self._size(number) for number in tokens}
        for size in sorted(sizes, reverse=True):  # the others find room in what the longest took
            self._graphs[size] = self._capture(size)

    def fits(self, joining: Sequence[Joining]) -> bool:
        """Whether there is a graph for these."""
        if len(joining) >= self._num_sequences or not all(one.is_new for one in joining):
            return False
        return self._size(self._least_tokens(joining)) in self._graphs

    def of(self, joining: Sequence[Joining]) -> Any:
        """The graph, to be replayed before the next is asked for, of prompts that fit."""
        size = self._size(self._least_tokens(joining))
        own, graph = self._graphs[size]
        own.copy_(self._filled(joining, size))
        return graph

    def _least_tokens(self, joining: Sequence[Joining]) -> int:
        free = self._num_sequences - len(joining)
        return sum(len(one.read_ids) for one in joining) + LEAST_PADS * free

    def _size(self, tokens: int) -> int:
        """Tokens of the smallest graph for so many: its products have whole steps of rows."""
        rows = tokens + self._num_beside
        return -(-rows // SIZE_STEP) * SIZE_STEP - self._num_beside

    def _filled(self, joining: Sequence[Joining], size: int) -> Prompts:
        """The prompts, and pads in all other sequences."""
        pads = [LEAST_PADS] * (self._num_sequences - len(joining))
        pads[-1] += size - self._least_tokens(joining)
        every = [*joining, *(pads_alone(self._config, number) for number in pads)]
        virtual = self._config.pre_seq_len or 0
        return Prompts.of(every, num_virtual=virtual, has_adapters=self._has_adapters)

    def _capture(self, size: int) -> tuple[Prompts, Any]:
        prompts = self._filled([], size)
        packed = replace(prompts.packed, longest_context=size, longest=size)  # as any may be
        own = replace(prompts, packed=packed).to(self.device)
        return own, capture(lambda: self._work(own), self._pool)
