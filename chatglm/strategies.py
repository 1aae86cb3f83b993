"""From one round's prompt and answer to a training sample that fits.

A sample is `prompt [gMASK] <sop> answer <eop>`. An answer that was cut gets no <eop>: a model that
learns to end in mid-sentence will.
"""

from dataclasses import dataclass

VERSION = 1
"""Named in the manifest of built records; raise it when a sample would come out different."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the control tokens of a sample."""

    gmask: int
    bos: int
    eos: int


@dataclass(frozen=True)
class Sample:
    """One training sequence: context_length ids and the <sop> are read, the rest is learned."""

    input_ids: list[int]
    context_length: int
    prompt_cut: bool = False
    answer_cut: bool = False


def truncate(
    prompt: list[int],
    answer: list[int],
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
    room = max_seq_length - 3  # [gMASK], <sop>, <eop>
    answer_room = max(room - len(prompt), min(ensure_answer_min_length, len(answer)))
    kept_answer = answer[:answer_room]
    prompt_room = room - len(kept_answer)
    kept_prompt = prompt[max(len(prompt) - prompt_room, 0) :]
    answer_cut = len(kept_answer) < len(answer)
    ending = [] if answer_cut else [special.eos]
    return Sample(
        input_ids=[*kept_prompt, special.gmask, special.bos, *kept_answer, *ending],
        context_length=len(kept_prompt) + 1,
        prompt_cut=len(kept_prompt) < len(prompt),
        answer_cut=answer_cut,
    )
