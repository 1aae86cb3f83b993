"""Prompt lookup: several tokens from one pass, where the answer repeats what was said before.

The last tokens are looked for in the prompt and in the answer so far, and what followed them there
is the draft (Saxena 2023, "Prompt Lookup Decoding"). One pass gives the likeliest token after each
token of the draft; the draft counts as far as it is what that pass says. So the answer is the
greedy one, whatever the draft is: to the last bit with up to 7 drafted, and up to the rounding of
other products beyond. Summaries and rewritings gain most; elsewhere a pass of some tokens costs
more than one of a single token.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import ops
from .sampling import Sampling
from .steps import CapturedStep

NGRAMS = (3, 2, 1)
"""Lengths of what is looked for; the longest that is found counts."""
MOST_DRAFTED = 15


class Checker(Protocol):
    """A model that reads several tokens of one sequence at once."""

    def start(self) -> int:
        """Read the prompt; the likeliest token after it."""

    def check(self, tokens: list[int]) -> list[int]:
        """The likeliest token after each of the tokens, which go behind those that were kept."""

    def keep(self, number: int) -> None:
        """Keep the first so many of the tokens checked last."""


def checked_tokens(
    checker: Checker, prompt: list[int], *, most_drafted: int, max_new_tokens: int
) -> Iterator[int]:
    """The greedy answer, token by token."""
    index = NgramIndex()
    for token in prompt:
        index.append(token)
    found = [checker.start()]
    told = 0
    while True:
        for token in found:
            index.append(token)
            yield token
        told += len(found)
        if told >= max_new_tokens:
            return
        draft = index.draft(min(most_drafted, max_new_tokens - told - 1))
        likeliest = checker.check([found[-1], *draft])
        right = next((n for n, token in enumerate(draft) if token != likeliest[n]), len(draft))
        checker.keep(right + 1)
        found = likeliest[: right + 1]


class NgramIndex:
    """Where each run of NGRAMS tokens was last followed by something."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def append(self, token: int) -> None:
        """One more token; the runs before it are followed by something now."""
        for length in NGRAMS:
            if len(self.tokens) >= length:
                self._ends[tuple(self.tokens[-length:])] = len(self.tokens)
        self.tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the last ones when they stood there before."""
        for length in NGRAMS:
            end = self._ends.get(tuple(self.tokens[-length:]))
            if end is not None:
                return self.tokens[end : end + most]
        return []


class DraftedStep(CapturedStep):
    """A captured step in which the rows are tokens of one sequence: the last one, and drafts."""

    def __init__(self, model: Any, *, rows: int, room: int, cache_bits: int):
        super().__init__(
            model, rows=rows, room=room + MOST_DRAFTED, cache_bits=cache_bits, sequences=1
        )
        self.given = torch.zeros(1 + rows, dtype=torch.int32).pin_memory()
        self._place = torch.zeros(3, dtype=torch.int32, device=model.device)
        self._told = torch.zeros(1 + rows, dtype=torch.int32, device=model.device)
        self._length = 0
        self._prompt: Tensor | None = None

    def read(self, prompt: Tensor) -> "DraftedStep":
        """The step, with the prompt (1, T) before it."""
        self._prompt = prompt
        return self

    @torch.inference_mode()
    def start(self) -> int:
        """Read the prompt; the likeliest token after it."""
        assert self._prompt is not None
        self.prefill(self._prompt, None)
        self.set_rules(Sampling(do_sample=False), seed=0, so_far=self._prompt)
        counts = self.counts
        self._length = int(counts.lengths[0]) + 1
        self._place.copy_(torch.stack(
            (counts.lengths[0] + 1, counts.text_positions[0], counts.first_blocks[0])
        ))  # fmt: skip
        self.first_token()
        return int(self.wait_for(0)[0])

    @torch.inference_mode()
    def check(self, tokens: list[int]) -> list[int]:
        """The likeliest token after each of the tokens, which go behind those that were kept."""
        self.history[0] = self.UNWRITTEN
        pads = [self.model.config.pad_token_id] * (self.rows - len(tokens))
        self.given.copy_(torch.tensor([self._length, *tokens, *pads]))
        self.next_token()
        return self.wait_for(0)[: len(tokens)].tolist()

    def keep(self, number: int) -> None:
        """Keep the first so many of the tokens checked last."""
        self._length += number

    def attend(self, number: int, mixed: Tensor, *, keys_are_new: bool = True) -> Tensor:
        """In a layer, (rows, H D) of the tokens' query, key and value (rows, 3 H D)."""
        assert keys_are_new  # those of the tokens
        keys, values, scales = self.cache.layer(number)
        assert scales is None
        query = ops.rotate(mixed[None], self._place, keys, values, self.rotary, offset=None)
        return ops.attention_of_drafts(
            query,
            keys,
            values,
            lengths=self._place,
            workspace=self.workspace,
            out=self.context,
        )

    def _step(self) -> None:
        self._told.copy_(self.given, non_blocking=True)
        self._place[:1].copy_(self._told[:1])
        self.counts.steps.zero_()
        self.hidden.copy_(
            F.embedding(self._told[1:], self.model.transformer.word_embeddings.weight)
        )
        super()._step()
