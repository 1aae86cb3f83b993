"""The rows' passes through the model: their prompts when they join, then a token of each a step."""

import hashlib
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from ..paged_cache import PAGE_TOKENS, PagedCache, Places, padded
from ..sampling import choose_tokens, guard_scores
from .request import Row


class Runner(Protocol):
    """Passes are told, and their tokens collected in the same order, perhaps some passes later."""

    steps_ahead: int
    """Passes that may be told before the tokens of the first are collected."""
    pads: bool
    """Whether prompts that are read together are padded to the longest."""

    @property
    def num_uncollected(self) -> int:
        """Passes whose tokens are still to be collected."""

    def warm_up(self) -> None:
        """Make whatever is made once, before the first row."""

    def budget(self, num_running: int) -> tuple[int, int] | None:
        """Rows that it is best to start together, and tokens of theirs; None: any."""

    def start(self, rows: Sequence[Row]) -> None:
        """Read the prompts, and the answers so far, of rows that join; gives a token of each, or
        leaves it to the next step, which they must take."""

    def step(self, rows: Sequence[Row]) -> None:
        """The next token of each row."""

    def collect(self) -> list[tuple[Row, int]]:
        """The tokens of the first pass that is not collected yet; waits for it."""


class PlainRunner:
    """The model's own forward pass, whatever the model is held in and wherever it stands."""

    steps_ahead, pads = 0, True

    def __init__(self, model: Any, *, num_pages: int):
        self.model, self.adapters = model, getattr(model, "row_adapters", None)
        self.cache = PagedCache(model, num_pages=num_pages)
        self.num_virtual = model.config.pre_seq_len or 0
        self._tokens: deque[list[tuple[Row, int]]] = deque()

    @property
    def num_uncollected(self) -> int:
        """Passes whose tokens are still to be collected."""
        return len(self._tokens)

    def warm_up(self) -> None:
        """Nothing is made once."""

    def budget(self, num_running: int) -> tuple[int, int] | None:
        """Rows and tokens in any number."""
        return None

    @torch.inference_mode()
    def start(self, rows: Sequence[Row]) -> None:
        """Read the prompts, and the answers so far, of rows that join; gives a token of each."""
        texts = [row.text_ids for row in rows]
        lengths = [len(text) for text in texts]
        longest = max(lengths)
        self._place(rows, firsts=[0] * len(rows), counts=[self.num_virtual + n for n in lengths],
                    pads=[longest - n for n in lengths])  # fmt: skip
        device = self.model.device
        ids = [[0] * (longest - len(text)) + text for text in texts]
        mask = [[0] * (longest - n) + [1] * n for n in lengths]
        scores = self._scores(
            rows,
            torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
        )
        self._choose(rows, scores)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> None:
        """The next token of each row."""
        device, firsts = self.model.device, [self.num_virtual + row.num_cached for row in rows]
        self._place(rows, firsts=firsts, counts=[1] * len(rows), pads=[0] * len(rows))
        lengths = torch.tensor([row.num_cached + 1 for row in rows], device=device)
        columns = torch.arange(int(lengths.max()), device=device)
        forbidden = (columns >= lengths[:, None])[:, None, None]  # (B, 1, 1, S)
        # <sop>, the prompt's last token, stands at block 1.
        positions = [
            (len(row.request.prompt) - 2, row.num_cached - len(row.request.prompt) + 2)
            for row in rows
        ]
        scores = self._scores(
            rows,
            torch.tensor([[row.tokens[-1]] for row in rows], device=device),
            attention_mask=forbidden,
            position_ids=torch.tensor(positions, device=device)[..., None],
        )
        self._choose(rows, scores)

    def collect(self) -> list[tuple[Row, int]]:
        """The tokens of the first pass that is not collected yet."""
        return self._tokens.popleft()

    def _scores(self, rows: Sequence[Row], input_ids: Tensor, **inputs: Any) -> Tensor:
        """Those after each row's last token, (B, V)."""
        if self.adapters is not None:
            self.adapters.choose([row.request.adapter for row in rows])
        device = self.model.device
        prompts = torch.tensor([len(row.request.prompt) for row in rows], device=device)
        return self.model(
            input_ids=input_ids,
            context_lengths=prompts - 1,  # up to <sop>
            mask_positions=prompts - 2,  # [gMASK]
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        ).logits[:, -1]

    def _place(
        self, rows: Sequence[Row], *, firsts: list[int], counts: list[int], pads: list[int]
    ) -> None:
        """So many new tokens of each row go behind its first ones; pads stand before them."""
        virtual = self.num_virtual
        places: list[list[int]] = [[], [], [], []]
        for number, (row, first, count, pad) in enumerate(
            zip(rows, firsts, counts, pads, strict=True)
        ):
            for token in range(count):
                page, offset = divmod(first + token, PAGE_TOKENS)
                column = token if first or token < virtual else pad + token
                for values, value in zip(
                    places, (number, column, row.pages[page], offset), strict=True
                ):
                    values.append(value)
        device = self.model.device
        table, num_keys = None, 0
        if firsts[0]:
            table = padded([row.pages for row in rows], device)
            num_keys = max(firsts) + 1
        numbers, columns, pages, offsets = torch.tensor(places, device=device)
        self.cache.place(Places(numbers, columns, pages, offsets, table, num_keys))

    def _choose(self, rows: Sequence[Row], scores: Tensor) -> None:
        likeliest = guard_scores(scores.float()).argmax(dim=-1).tolist()
        chosen = [
            self._draw(row, scores[number : number + 1]) if _is_drawn(row) else likeliest[number]
            for number, row in enumerate(rows)
        ]
        self._tokens.append(list(zip(rows, chosen, strict=True)))
        for row in rows:
            row.num_told += 1

    def _draw(self, row: Row, scores: Tensor) -> int:
        """By the row's own rules and seed, and by how many tokens it has: not by its fellows."""
        sampling, device = row.request.sampling, scores.device
        generator = torch.Generator(device)
        generator.manual_seed(_mixed(row.request.seed, len(row.tokens)))
        so_far = torch.tensor([row.text_ids], device=device)
        rules = LogitsProcessorList(sampling.processors())
        return int(choose_tokens(scores, so_far, sampling, rules, generator=generator))


def _mixed(seed: int, number: int) -> int:
    """32 bits, which are all that torch's generator on a CPU looks at."""
    words = seed.to_bytes(8, "little") + number.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(words, digest_size=4).digest(), "little")


def _is_drawn(row: Row) -> bool:
    sampling = row.request.sampling
    return sampling.do_sample or sampling.repetition_penalty != 1.0
