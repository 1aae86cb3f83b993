"""Prompts that are to be read into pages, and the pass over one of them as a CUDA graph.

A prompt's pass is some hundreds of launches, which cost the host twice the time that the GPU takes
for them; and mostly one prompt joins at a time. So there is a graph for one prompt of each number
of tokens, in steps of SIZE_STEP: beside it in the row stands a sequence of pads that fills the
step. Several prompts, and answers that are read again, go without a graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .packed import Packed, send
from .paged_cache import PAGE_TOKENS, padded
from .prefill import read_packed
from .sampling import Sampling

SIZE_STEP = 64
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
        packed = Packed.of(contexts, [len(one.ids) for one in joining])
        table, before = padded([one.pages for one in joining], torch.device("cpu")), num_virtual
        return cls(
            packed.row([one.ids for one in joining]),
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


def read_scores(model: Any, prompts: Prompts, pages: Callable[[int], Any]) -> Tensor:
    """Scores (N, V) after the prompts, on the model's device; see prefill.read_packed."""
    if hasattr(model, "row_adapters"):
        model.row_adapters.index = prompts.adapters
    hidden = read_packed(
        model,
        prompts.ids,
        prompts.packed,
        pages,
        slots=prompts.slots,
        virtual_slots=prompts.virtual_slots,
    )
    return model.lm_head(hidden)


class PromptGraphs:
    """Passes over one new prompt, captured at the first of each size."""

    def __init__(self, device: torch.device, *, num_virtual: int, has_adapters: bool):
        self.device = device
        self._num_virtual, self._has_adapters = num_virtual, has_adapters
        self._pages = -(-num_virtual // PAGE_TOKENS)
        self._graphs: dict[int, tuple[Prompts, Any, list[Tensor]]] = {}
        self._pool: Any = None

    def read(self, one: Joining, work: Callable[[Prompts], Tensor], pad_token_id: int) -> Tensor:
        """Scores (1, V) after the prompt; work: scores (N, V) of prompts."""
        size = -(-one.prompt_length // SIZE_STEP) * SIZE_STEP
        pads = size - one.prompt_length + 2  # a context of at least one, and its <sop>
        pages = [SCRATCH_PAGE] * (self._pages + -(-pads // PAGE_TOKENS) + 1)
        beside = Joining([pad_token_id] * pads, pads, pages, one.sampling, seed=0)
        prompts = Prompts.of(
            [one, beside], num_virtual=self._num_virtual, has_adapters=self._has_adapters
        )
        if size not in self._graphs:
            self._graphs[size] = self._capture(prompts, size, work)
        own, graph, scores = self._graphs[size]
        own.copy_(prompts)
        graph.replay()
        return scores[0][:1]

    def _capture(
        self, prompts: Prompts, size: int, work: Callable[[Prompts], Tensor]
    ) -> tuple[Prompts, Any, list[Tensor]]:
        # As long as any prompt of the size.
        packed = replace(prompts.packed, longest_context=size, longest=size + 1)
        own, scores = replace(prompts, packed=packed).to(self.device), [torch.empty(0)]

        def run() -> None:
            scores[0] = work(own)

        if self._pool is None:
            self._pool = new_pool()
        return own, capture(run, self._pool), scores


def new_pool() -> Any:
    """Memory that graphs share, of which one runs at a time."""
    return torch.cuda.graph_pool_handle()


def capture(work: Callable[[], None], pool: Any) -> Any:
    """A graph of the work; what it holds on to must be kept."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()  # compiles what is not compiled yet, and lets libraries set themselves up
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        work()
    return graph
