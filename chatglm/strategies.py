"""From one round's prompt and answer to training samples that fit.

A sample is `prompt [gMASK] <sop> answer <eop>`. An answer that was cut gets no <eop>: a model that
learns to end in mid-sentence will. A round that is too long is either cut once (`truncate`) or
read through a window that moves on (`slide`); `cut` does what the settings say.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import numpy as np

from .errors import ToolkitError

VERSION = 2
"""Named in the manifest of built records; raise it when a sample would come out different."""

Ids = np.ndarray | list[int]
"""Token ids: an int32 array, or a list, which takes several times as long."""

_INT32 = np.dtype(np.int32)
_CONTROL_TOKENS = 3
"""[gMASK], <sop> and <eop>, for which every sample leaves room."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the control tokens of a sample."""

    gmask: int
    bos: int
    eos: int

    @cached_property
    def opening(self) -> np.ndarray:
        """What stands between context and learned tokens."""
        return np.array([self.gmask, self.bos], dtype=_INT32)

    @cached_property
    def ending(self) -> np.ndarray:
        """What a whole answer ends with."""
        return np.array([self.eos], dtype=_INT32)

    @cached_property
    def as_bytes(self) -> tuple[bytes, bytes]:
        """Opening and ending."""
        return self.opening.tobytes(), self.ending.tobytes()

    @cached_property
    def no_ending(self) -> np.ndarray:
        """What a cut answer ends with."""
        return np.array([], dtype=_INT32)


@dataclass(eq=False, slots=True)  # frozen, it would take twice as long to make
class Sample:
    """One training sequence: context_length ids and the <sop> are read, the rest is learned."""

    input_ids: np.ndarray
    """int32; a list is turned into that."""
    context_length: int
    prompt_cut: bool = False
    """Its context is not the whole prompt."""
    answer_cut: bool = False
    """More of the round follows what it learns."""
    window: int = 0
    """Its number among the samples of its round. The one with a 1 is there once in every round that
    gave more than one sample, and in no other."""

    def __post_init__(self):
        ids = self.input_ids
        if type(ids) is not np.ndarray or ids.dtype != _INT32:
            self.input_ids = np.asarray(ids, dtype=_INT32)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sample):
            return NotImplemented
        names = (field.name for field in fields(self))
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)


@dataclass(frozen=True)
class CutRules:
    """The DataSettings of these names, and the length that they are for.

    Raises:
        ToolkitError: for what max_seq_length has no room for.
    """

    max_seq_length: int
    strategy: Literal["truncation", "single_sliding", "double_sliding"]
    ensure_answer_min_length: int
    sliding_size: int | None
    p: int

    def __post_init__(self):
        least = self.ensure_answer_min_length + 1 + _CONTROL_TOKENS
        if self.max_seq_length < least:
            raise ToolkitError(
                f"ensure_answer_min_length {self.ensure_answer_min_length} leaves no room for a"
                f" prompt in max_seq_length {self.max_seq_length}: raise max_seq_length to at least"
                f" {least}"
            )
        for name, most in (("sliding_size", self.room), ("p", self.room - 1)):
            value = getattr(self, name)
            if value is not None and value > most:
                raise ToolkitError(
                    f"{name} {value}: with max_seq_length {self.max_seq_length}, a window holds"
                    f" {self.room} tokens of text, so allowed is up to {most}"
                )

    @cached_property
    def room(self) -> int:
        """Tokens of prompt and answer that a sample holds."""
        return self.max_seq_length - _CONTROL_TOKENS

    @cached_property
    def stride(self) -> int:
        """Tokens by which a window moves on."""
        return self.sliding_size or min(2 * self.max_seq_length // 3, self.room)

    @cached_property
    def least_context(self) -> int:
        """Tokens that a window reads before those of the answer that it learns."""
        return max(self.room - self.stride, 1)  # of a text; a first token follows from nothing


def cut(
    prompt: Ids,
    answer: Ids,
    special: SpecialTokens,
    rules: CutRules,
    generator: np.random.Generator,
) -> list[Sample]:
    """The samples of a round, in order: a single one wherever all of it fits, or with truncation.

    generator: is drawn from only where rules.p is negative.
    """
    if len(prompt) + len(answer) <= rules.room:
        return [_joined(prompt, answer, special)]
    if rules.strategy != "truncation":
        return slide(prompt, answer, special, rules, generator)
    return [
        truncate(
            prompt,
            answer,
            special,
            max_seq_length=rules.max_seq_length,
            ensure_answer_min_length=rules.ensure_answer_min_length,
        )
    ]


def whole(prompt: bytes, answer: bytes, special: SpecialTokens) -> bytes:
    """The ids of a sample with nothing cut, out of the bytes of int32 ids."""
    opening, ending = special.as_bytes
    return b"".join((prompt, opening, answer, ending))


def truncate(
    prompt: Ids,
    answer: Ids,
    special: SpecialTokens,
    *,
    max_seq_length: int,
    ensure_answer_min_length: int,
) -> Sample:
    """The sample, at most max_seq_length long.

        oldest prompt tokens | prompt | [gMASK] <sop> | answer | rest of the answer
              2nd to go      |            kept                 |     1st to go

    The answer's end goes first, down to ensure_answer_min_length tokens; then the prompt's oldest
    tokens go. max_seq_length must be above ensure_answer_min_length + 3.
    """
    room = max_seq_length - _CONTROL_TOKENS
    answer_room = max(room - len(prompt), min(ensure_answer_min_length, len(answer)))
    kept_answer = answer[:answer_room]
    prompt_room = room - len(kept_answer)
    kept_prompt = prompt[max(len(prompt) - prompt_room, 0) :]
    return _joined(
        kept_prompt,
        kept_answer,
        special,
        len(kept_prompt) < len(prompt),
        len(kept_answer) < len(answer),
    )


def slide(
    prompt: Ids,
    answer: Ids,
    special: SpecialTokens,
    rules: CutRules,
    generator: np.random.Generator,
) -> list[Sample]:
    """The samples of a round through a window that moves on by sliding_size tokens.

    A window of 12 tokens over a prompt of 24 and an answer of 20, with sliding_size 8 and p 1;
    "." is read, "#" is learned. single_sliding moves on over prompt and answer as one text:

        ------- prompt ---------------- answer -----
        ...........#
                ...........#
                            ....########
                                    ....########
                                        ........####<eop>

    double_sliding moves on over the prompt, then over the answer, each stretch of which is read
    after the prompt's end, so that the question stands before all of them:

        ------- prompt ---------------- answer -----
        ...........#
                ...........#
                            ....########
                            ....        ########
                        ........                ####<eop>

    A prompt longer than the window is a text to learn from: every window that lies inside it learns
    its last p tokens; with p below 0, a number of them drawn for each window; with p 0 there are no
    such windows. One more ends with the prompt where tokens of it would be read by none. Of a
    shorter prompt, the first window of the answer reads what fits, and says prompt_cut.

    Every token of the answer is learned once. Before it are read at least as many tokens as a
    window and sliding_size differ by, but one at least, and as many as fit where prompt or answer
    leave room.
    """
    parts = [
        *_windows_of_the_prompt(prompt, len(answer), rules, generator),
        *_windows_of_the_answer(prompt, answer, rules),
    ]
    return [
        _joined(context, learned, special, prompt_cut, answer_cut, number)
        for number, (context, learned, prompt_cut, answer_cut) in enumerate(parts)
    ]


def _windows_of_the_prompt(
    prompt: Ids, answer_length: int, rules: CutRules, generator: np.random.Generator
) -> Iterator[tuple[Ids, Ids, bool, bool]]:
    """Context, learned tokens, prompt_cut and answer_cut of the windows inside a long prompt."""
    room = rules.room
    if len(prompt) <= room or rules.p == 0:
        return
    starts = [*range(0, len(prompt) - room + 1, rules.stride)]
    read_before_the_answer = max(rules.least_context, room - answer_length)
    if starts[-1] + room < len(prompt) - read_before_the_answer:
        starts.append(len(prompt) - room)
    if rules.p < 0:
        context_lengths = generator.integers(1, room, len(starts)).tolist()
    else:
        context_lengths = [room - rules.p] * len(starts)
    for start, length in zip(starts, context_lengths, strict=True):
        middle = start + length
        yield prompt[start:middle], prompt[middle : start + room], True, True


def _windows_of_the_answer(
    prompt: Ids, answer: Ids, rules: CutRules
) -> Iterator[tuple[Ids, Ids, bool, bool]]:
    """Context, learned tokens, prompt_cut and answer_cut of the windows over the answer."""
    single = rules.strategy == "single_sliding"
    text = np.concatenate((prompt, answer)) if single else prompt
    start, more = 0, True  # an empty answer has an <eop> to learn
    while more:
        end = len(prompt) + (start if single else 0)
        stop = min(start + rules.room - min(rules.least_context, end), len(answer))
        length = min(end, rules.room - (stop - start))
        more = stop < len(answer)
        yield text[end - length : end], answer[start:stop], length < end, more
        start = stop


def _joined(
    context: Ids,
    learned: Ids,
    special: SpecialTokens,
    prompt_cut: bool = False,
    answer_cut: bool = False,
    window: int = 0,
) -> Sample:
    """The sample of these tokens."""
    ending = special.no_ending if answer_cut else special.ending
    ids = np.concatenate((context, special.opening, learned, ending))
    return Sample(ids, len(context) + 1, prompt_cut, answer_cut, window)
