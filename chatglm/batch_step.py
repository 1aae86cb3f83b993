"""Captured steps of a batch that rows join and leave, over keys and values in pages.

There are buffers for the largest batch, and a graph for each of BATCHES over the first so many rows
of them. Rows stand without gaps: when one leaves, the last one takes its place. A place without a
row has a step below 0: the kernels pass it by.

A row that joins has its prompt read up to the last token, which takes its step as the tokens of all
other rows do. Where many rows run, prompts are read in the same pass as that step: among hundreds
of rows a few more cost a product next to nothing, and the weights are read once for both (Agrawal
et al. 2023, "SARATHI"). With few rows prompts have a pass of their own, and an answer is the same
to the last bit whoever else is served.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .capture import new_pool
from .kernels import ops
from .packed import send
from .paged_cache import PAGE_TOKENS
from .prefill import read_packed
from .prompt_graphs import SCRATCH_PAGE, Joining, PromptGraphs, Prompts, pads_alone
from .row_adapters import RowLinear
from .steps import LIBRARY_ROWS, CapturedStep, Counts, seed_words, token_bits

BATCHES = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32)
"""Rows of a graph: the fewest that hold a batch; beyond, in steps of the last difference."""
HISTORY_LINES = 8
"""Passes that may be told before the tokens of the first are looked at, and some."""
WARM_TOKENS = (64, 128, 192, 256, 384, 512, 640, 768, 1024, 1536, 2048)
"""Of prompts of which two are read together before there are any."""
ALONE_ROWS = min(LIBRARY_ROWS, ops.FEW_ROWS)
"""Rows that take no step beside a prompt: their products are those of one row, to the last bit."""
MOST_PROMPTS_BESIDE, MOST_TOKENS_BESIDE = 7, 600
"""Of prompts in one pass with a step, though one alone may be longer. More tokens cost what they
cost alone, while a step beside few costs next to nothing: on an H100 a step of 32 rows takes 8.1
ms, with 608 tokens 15.3, with 1,056 tokens 27.6."""


class PagedStepCache:
    """(layers, 2, pages, H, PAGE_TOKENS, D)."""

    def __init__(self, model: Any, *, num_pages: int):
        config, self.dtype = model.config, model.transformer.dtype
        shape = (config.num_layers, 2, num_pages, config.num_attention_heads, PAGE_TOKENS,
                 config.head_width)  # fmt: skip
        self.stored = torch.zeros(shape, dtype=self.dtype, device=model.device)

    @property
    def nbytes(self) -> int:
        """Of all pages."""
        return self.stored.nbytes

    def layer(self, number: int) -> tuple[Tensor, Tensor, None]:
        """Keys and values (pages, H, PAGE_TOKENS, D)."""
        keys, values = self.stored[number]
        return keys, values, None


class BatchStep(CapturedStep):
    """A step of up to most_rows rows, each over pages of its own."""

    is_ring = True
    table: Tensor

    def __init__(self, model: Any, *, most_rows: int, num_pages: int):
        """num_pages: the first of which no row may have; see SCRATCH_PAGE."""
        self._num_pages = num_pages
        longest = model.config.max_sequence_length + (model.config.pre_seq_len or 0)
        columns = -(-longest // PAGE_TOKENS)
        super().__init__(model, rows=most_rows, room=columns * PAGE_TOKENS)
        device = model.device
        self.history = torch.full(
            (HISTORY_LINES, most_rows), self.UNWRITTEN, dtype=torch.int32
        ).pin_memory()
        self.table = torch.full(
            (most_rows, columns), SCRATCH_PAGE, dtype=torch.int32, device=device
        )
        self.adapters = torch.zeros(most_rows, dtype=torch.int64, device=device)
        self.counts.steps.fill_(-1)
        self._batches: dict[int, CapturedStep] = {}
        pool = new_pool()
        self._prompts = PromptGraphs(
            model, self._read_prompts, most_prompts=1, num_beside=0, pool=pool
        )
        self._prompts_and_step = PromptGraphs(
            model,
            self._read_prompts_and_step,
            most_prompts=MOST_PROMPTS_BESIDE,
            num_beside=most_rows,
            pool=pool,
        )
        self._next: Any = None
        """A graph for the next step, which reads prompts as well."""
        for module in model.modules():
            if isinstance(module, RowLinear):
                module.to(model.transformer.dtype)  # products of one precision

    def _make_cache(self, model: Any, bits: int) -> PagedStepCache:
        return PagedStepCache(model, num_pages=self._num_pages)

    def _places(self, first: int, end: int) -> "BatchStep":
        """This step over some of its places alone, with no graph yet."""
        part = copy.copy(self)
        part.rows, part.graph = end - first, None
        for name in ("hidden", "normed", "context", "mixed", "inner", "scores", "tokens", "table",
                     "adapters"):  # fmt: skip
            setattr(part, name, getattr(self, name)[first:end])
        part.history = self.history[:, first:end]
        part.counts = Counts(*(tensor[first:end] for tensor in vars(self.counts).values()))
        part.draw = ops.Draw(*(tensor[first:end] for tensor in vars(self.draw).values()))
        part._norms_within = self._norm_fits(part.rows)
        return part

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture the graphs of all batches and prompts, and read some prompts together, whose
        products are other kernels, loaded at their first use; there may be no row yet."""
        sizes = {batch_size(rows) for rows in range(1, self.rows + 1)}
        for size in sorted(sizes, reverse=True):
            self._batch(min(size, self.rows)).next_token()
        config = self.model.config
        with self._on_device():
            if self.rows > ALONE_ROWS:  # the largest first: the others find room in what it took
                self._prompts_and_step.warm_up()
            self._prompts.warm_up()
            for length in WARM_TOKENS:
                self._read([pads_alone(config, min(length, config.max_sequence_length))] * 2)

    def budget(self, rows: int) -> tuple[int, int] | None:
        """Prompts, and tokens of theirs, to be read together where so many rows run; None: any."""
        return (MOST_PROMPTS_BESIDE, MOST_TOKENS_BESIDE) if rows >= ALONE_ROWS else None

    @torch.inference_mode()
    def join(self, first: int, joining: Sequence[Joining]) -> None:
        """Rows take the places from first on, to which the next step must go. What comes before
        the last token of each is read now or, where many rows run, beside that step."""
        places = range(first, first + len(joining))
        with self._on_device():
            try:
                beside = (
                    len(places) + first > ALONE_ROWS
                    and self._next is None
                    and self._prompts_and_step.fits(joining)
                )
                if beside:
                    graph = self._prompts_and_step.of(joining)
                else:
                    self._read(joining)
                for values, given in self._places(first, places.stop)._values_of(joining):
                    values.copy_(given)
            except Exception:  # others go on, and may not pass through half a row
                for place in places:
                    self.clear(place)
                raise
            if beside:
                self._next = graph

    def _read(self, joining: Sequence[Joining]) -> None:
        """The prompts in a pass of their own."""
        if self._prompts.fits(joining):
            self._prompts.of(joining).replay()
            return
        model = self.model
        has_adapters = hasattr(model, "row_adapters") and any(one.adapter for one in joining)
        virtual: int = model.config.pre_seq_len or 0
        prompts = Prompts.of(joining, num_virtual=virtual, has_adapters=has_adapters)
        self._read_prompts(prompts.to(model.device))

    def _read_prompts(self, prompts: Prompts, *, beside: bool = False) -> Tensor | None:
        """beside: the rows of all places pass through with them; gives their hidden states."""
        model, adapters = self.model, prompts.adapters
        if beside and adapters is not None:
            adapters = torch.cat((adapters, self.adapters))
        if hasattr(model, "row_adapters"):
            model.row_adapters.index = adapters
        return read_packed(
            model,
            prompts.ids,
            prompts.packed,
            lambda number: self.cache.layer(number)[:2],
            slots=prompts.slots,
            virtual_slots=prompts.virtual_slots,
            beside=self if beside else None,
        )

    def _read_prompts_and_step(self, prompts: Prompts) -> None:
        """The rows of all places take a step as well."""
        hidden = self._read_prompts(prompts, beside=True)
        self.scores.copy_(self.model.lm_head(hidden))
        self._sample()

    def _values_of(self, joining: Sequence[Joining]) -> list[tuple[Tensor, Tensor]]:
        """Counts, rules and last tokens of these places, and what they are to be."""
        virtual, counts, draw = self.model.config.pre_seq_len or 0, self.counts, self.draw
        samplings = [one.sampling for one in joining]
        columns = self.table.shape[1]
        seen = torch.zeros_like(draw.seen)
        for place, one in enumerate(joining):
            if one.sampling.repetition_penalty != 1.0:
                ids = send(torch.tensor([one.ids]), seen.device)
                seen[place].copy_(token_bits(ids, seen.shape[1])[0])
        listed: list[tuple[Tensor, list[Any]]] = [
            (counts.lengths, [virtual + len(one.read_ids) for one in joining]),
            (counts.text_positions, [one.prompt_length - 2 for one in joining]),
            (counts.first_blocks, [virtual + one.prompt_length - 2 for one in joining]),
            (self.adapters, [one.adapter for one in joining]),
            (draw.top_k, [s.top_k if s.do_sample else 1 for s in samplings]),
            (draw.rules, [
                (s.top_p, 1 / s.temperature if s.do_sample else 1.0, s.repetition_penalty)
                for s in samplings
            ]),
            (self.table, [
                one.pages + [SCRATCH_PAGE] * (columns - len(one.pages)) for one in joining
            ]),
        ]  # fmt: skip
        last_ids = send(torch.tensor([one.ids[-1] for one in joining]), seen.device)
        return [
            (self.hidden, self.model.transformer.word_embeddings(last_ids)),
            (draw.seen, seen),
            (draw.seeds, send(seed_words([(one.seed, 0) for one in joining]), seen.device)),
            *((own, send(torch.tensor(new, dtype=own.dtype), own.device)) for own, new in listed),
        ]

    def set_pages(self, place: int, pages: list[int]) -> None:
        """The pages of the row at a place, in the order of its tokens."""
        numbers = torch.tensor(pages, dtype=torch.int32)
        self.table[place, : len(pages)].copy_(send(numbers, self.table.device))

    def move(self, source: int, target: int) -> None:
        """The row at source goes to target; source is without a row."""
        for tensor in (*vars(self.counts).values(), *vars(self.draw).values(), self.tokens,
                       self.hidden, self.table, self.adapters):  # fmt: skip
            tensor[target].copy_(tensor[source])
        self.clear(source)

    def clear(self, place: int) -> None:
        """No row is at a place any more."""
        self.counts.steps[place].fill_(-1)
        for tensor in (self.counts.lengths, self.counts.text_positions, self.counts.first_blocks):
            tensor[place].fill_(0)
        self.table[place].fill_(SCRATCH_PAGE)
        self.adapters[place].fill_(0)

    @torch.inference_mode()
    def step(self, rows: int, *, number: int) -> None:
        """The next token of the first so many rows, in the history's line for this number, which
        is that of the step, counted from 0."""
        self.history[number % HISTORY_LINES] = self.UNWRITTEN
        self.counts.steps[:rows].fill_(number)
        graph, self._next = self._next, None
        if graph is None:
            self._batch(min(batch_size(rows), self.rows)).next_token()
            return
        with self._on_device():
            graph.replay()

    def _batch(self, size: int) -> CapturedStep:
        if size not in self._batches:
            self._batches[size] = self._places(0, size)
        return self._batches[size]

    def tokens_of(self, rows: int, *, number: int) -> list[int]:
        """Those of a step, of the first so many places; waits for them."""
        part = copy.copy(self)
        part.history = self.history[:, :rows]
        return part.wait_for(number % HISTORY_LINES).tolist()

    def _product(self, x, linear, out, *, norm=None, gelu=False, alpha=None) -> None:
        if not isinstance(linear, RowLinear):
            super()._product(x, linear, out, norm=norm, gelu=gelu, alpha=alpha)
            return
        base: Any = linear.linear
        super()._product(x, base, out, norm=norm)
        given = x if norm is None else self.normed
        out.add_(linear.added(given[:, None], self.adapters)[:, 0])
        if gelu:
            torch.ops.aten.gelu.out(out, approximate="tanh", out=out)
        if alpha is not None:
            out.add_(self.normed, alpha=alpha)


def batch_size(rows: int) -> int:
    """Rows of the graph that a batch takes."""
    if rows <= BATCHES[-1]:
        return next(size for size in BATCHES if size >= rows)
    step = BATCHES[-1] - BATCHES[-2]
    return -(-rows // step) * step
