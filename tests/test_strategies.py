"""What a cut leaves, for every pair of lengths, and what a sliding window reads and learns."""

from inspect import cleandoc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatglm.errors import ToolkitError
from chatglm.strategies import CutRules, Sample, SpecialTokens, cut, slide, truncate

SPECIAL = SpecialTokens(gmask=-1, bos=-2, eos=-3)
SLIDING = ("single_sliding", "double_sliding")


def parts(sample):
    """The tokens before [gMASK], and those after <sop>."""
    ids, middle = sample.input_ids.tolist(), sample.context_length
    return ids[: middle - 1], ids[middle + 1 :]


# Truncation.


@st.composite
def cuts(draw):
    least = draw(st.integers(1, 12))
    return {
        "prompt": list(range(draw(st.integers(0, 60)))),
        "answer": list(range(1000, 1000 + draw(st.integers(0, 60)))),
        "max_seq_length": draw(st.integers(least + 4, 80)),
        "ensure_answer_min_length": least,
    }


def truncated(prompt, answer, **options):
    sample = truncate(prompt, answer, SPECIAL, **options)
    return sample, *parts(sample)


def check_control_tokens(sample):
    ids, middle = sample.input_ids.tolist(), sample.context_length
    assert ids[middle - 1 : middle + 1] == [SPECIAL.gmask, SPECIAL.bos]
    assert ids.count(SPECIAL.gmask) == ids.count(SPECIAL.bos) == 1


@given(cuts())
def test_a_sample_is_never_longer_than_max_seq_length(case):
    assert len(truncated(**case)[0].input_ids) <= case["max_seq_length"]


@given(cuts())
def test_the_context_ends_with_gmask_and_sop_follows_it(case):
    check_control_tokens(truncated(**case)[0])


@given(cuts())
def test_eop_ends_the_sample_if_and_only_if_the_answer_is_whole(case):
    sample, _, learned = truncated(**case)
    whole = learned == [*case["answer"], SPECIAL.eos]
    assert (SPECIAL.eos in sample.input_ids) == whole == (not sample.answer_cut)


@given(cuts())
def test_the_learned_tokens_are_a_beginning_of_the_answer(case):
    learned = [token for token in truncated(**case)[2] if token != SPECIAL.eos]
    assert learned == case["answer"][: len(learned)]
    assert len(learned) >= min(case["ensure_answer_min_length"], len(case["answer"]))


@given(cuts())
def test_the_prompt_keeps_its_newest_tokens(case):
    sample, kept, _ = truncated(**case)
    assert kept == case["prompt"][len(case["prompt"]) - len(kept) :]
    assert sample.prompt_cut == (len(kept) < len(case["prompt"]))


@given(cuts())
def test_nothing_is_lost_when_it_fits(case):
    sample, prompt, learned = truncated(**case)
    if len(case["prompt"]) + len(case["answer"]) + 3 <= case["max_seq_length"]:
        assert prompt == case["prompt"] and learned == [*case["answer"], SPECIAL.eos]
        assert not sample.prompt_cut and not sample.answer_cut


@given(cuts())
def test_the_prompt_is_cut_only_when_the_answer_is_down_to_its_least(case):
    sample, _, learned = truncated(**case)
    if sample.prompt_cut:
        kept = [token for token in learned if token != SPECIAL.eos]
        assert len(kept) == min(case["ensure_answer_min_length"], len(case["answer"]))


@given(cuts())
def test_a_cut_by_truncation_is_that_of_truncate(case):
    least, length = case["ensure_answer_min_length"], case["max_seq_length"]
    rules = CutRules(length, "truncation", least, None, 1)
    assert cut(case["prompt"], case["answer"], SPECIAL, rules, None) == [truncated(**case)[0]]


# Sliding.


def text_of(prompt, answer):
    """A prompt and an answer of these lengths; every token tells where it stood."""
    tokens = np.arange(prompt + answer, dtype=np.int32)
    return tokens[:prompt], tokens[prompt:]


@st.composite
def rounds(draw, strategies=SLIDING, p=None):
    """Lengths of prompt and answer, rules that slide, and a seed."""
    room = draw(st.integers(2, 40))
    rules = CutRules(
        max_seq_length=room + 3,
        strategy=draw(st.sampled_from(strategies)),
        ensure_answer_min_length=1,
        sliding_size=draw(st.none() | st.integers(1, room)),
        p=draw(st.integers(-1, room - 1)) if p is None else p,
    )
    return draw(st.integers(0, 120)), draw(st.integers(0, 120)), rules, draw(st.integers(0, 9))


def windows(case):
    """The samples of a round: those that learn its prompt, and those that learn its answer."""
    prompt, answer, rules, seed = case
    generator = np.random.default_rng(seed)
    samples = cut(*text_of(prompt, answer), SPECIAL, rules, generator)
    first = next(i for i, one in enumerate(samples) if parts(one)[1][0] not in range(prompt))
    return samples[:first], samples[first:]


@given(rounds())
def test_a_window_is_never_longer_than_max_seq_length_and_has_its_control_tokens(case):
    inside, after = windows(case)
    for sample in inside + after:
        assert len(sample.input_ids) <= case[2].max_seq_length
        check_control_tokens(sample)


@given(rounds())
def test_a_window_reads_a_token_of_text_wherever_there_is_a_prompt(case):
    inside, after = windows(case)
    for sample in inside + after if case[0] else []:
        assert parts(sample)[0]


@given(rounds())
def test_every_token_of_the_answer_is_learned_once_in_order_and_one_eop(case):
    prompt, answer, _, _ = case
    learned = [token for sample in windows(case)[1] for token in parts(sample)[1]]
    assert learned == [*range(prompt, prompt + answer), SPECIAL.eos]


@given(rounds())
def test_eop_stands_in_the_last_window_alone_and_the_others_have_a_cut_answer(case):
    inside, after = windows(case)
    *others, last = inside + after
    assert last.input_ids[-1] == SPECIAL.eos and not last.answer_cut
    assert all(SPECIAL.eos not in one.input_ids and one.answer_cut for one in others)


@given(rounds(["single_sliding"]))
def test_single_sliding_reads_the_text_just_before_what_it_learns(case):
    for sample in windows(case)[1]:
        context, learned = parts(sample)
        end = case[0] + case[1] if learned == [SPECIAL.eos] else learned[0]
        assert context == list(range(end - len(context), end))
        assert sample.prompt_cut == (len(context) < end)


@given(rounds(["double_sliding"]))
def test_double_sliding_reads_the_end_of_the_prompt(case):
    prompt = case[0]
    for sample in windows(case)[1]:
        context, _ = parts(sample)
        assert context == list(range(prompt - len(context), prompt))
        assert sample.prompt_cut == (len(context) < prompt)


@given(rounds())
def test_a_window_of_the_answer_is_full_and_reads_more_than_it_must_only_at_the_end(case):
    prompt, _, rules, _ = case
    start = 0
    for sample in windows(case)[1]:
        context, learned = parts(sample)
        learned = [token for token in learned if token != SPECIAL.eos]
        there = prompt + (start if rules.strategy == "single_sliding" else 0)
        least = min(there, max(rules.room - rules.stride, 1))
        assert len(context) >= least
        assert len(context) == there or len(context) + len(learned) == rules.room
        assert not sample.answer_cut or len(context) == least
        start += len(learned)


@given(rounds())
def test_windows_inside_a_long_prompt_are_stride_apart_and_a_last_one_ends_with_it(case):
    prompt, _, rules, _ = case
    inside, _ = windows(case)
    if prompt <= rules.room or rules.p == 0:
        assert not inside
        return
    fitting = (prompt - rules.room) // rules.stride + 1
    assert len(inside) - fitting in (0, 1)
    starts = [number * rules.stride for number in range(fitting)] + [prompt - rules.room]
    for start, sample in zip(starts, inside, strict=False):
        context, learned = parts(sample)
        assert context + learned == list(range(start, start + rules.room))
        assert rules.p < 0 or len(learned) == rules.p
        assert context and learned and sample.prompt_cut


@given(rounds())
def test_every_token_of_a_prompt_longer_than_a_window_is_read_unless_p_is_0(case):
    prompt, _, rules, _ = case
    inside, after = windows(case)
    read = {token for sample in inside + after for part in parts(sample) for token in part}
    assert prompt <= rules.room or rules.p == 0 or read >= {*range(prompt)}


@given(rounds())
def test_a_last_window_of_the_prompt_reads_what_no_other_does(case):
    prompt, _, rules, _ = case
    inside, after = windows(case)
    if inside and len(inside) > (prompt - rules.room) // rules.stride + 1:
        *others, last = (
            {*context, *learned} for context, learned in map(parts, (after[0], *inside))
        )
        assert last - set().union(*others)


@given(rounds())
def test_the_windows_of_a_round_are_numbered(case):
    inside, after = windows(case)
    assert [one.window for one in inside + after] == list(range(len(inside + after)))


@given(rounds(p=-1))
def test_a_seed_draws_the_same_windows_again(case):
    assert windows(case) == windows(case)


def test_every_window_of_every_prompt_is_cut_elsewhere():
    rules = CutRules(1003, "single_sliding", 1, 10, -1)
    generator = np.random.default_rng(0)
    first, second = (
        [
            sample.context_length
            for sample in cut(*text_of(1100, 5), SPECIAL, rules, generator)
            if sample.answer_cut
        ]
        for _ in range(2)
    )
    assert len(first) == len(second) == 11
    assert len({*first, *second}) > 15


def test_a_drawn_cut_leaves_each_length_there_is():
    rules = CutRules(8, "double_sliding", 1, 1, -1)
    inside, _ = windows((300, 1, rules, 0))
    assert {len(parts(sample)[1]) for sample in inside} == {1, 2, 3, 4}


@given(rounds())
def test_what_fits_is_one_sample_by_every_strategy(case):
    prompt, answer, rules, _ = case
    prompt = min(prompt, rules.room)
    texts = text_of(prompt, min(answer, rules.room - prompt))
    limits = {"max_seq_length": rules.max_seq_length, "ensure_answer_min_length": 1}
    expected = [truncate(*texts, SPECIAL, **limits)]
    assert cut(*texts, SPECIAL, rules, None) == slide(*texts, SPECIAL, rules, None) == expected


@given(rounds())
def test_lists_give_the_samples_of_arrays(case):
    prompt, answer, rules, seed = case
    lists = [tokens.tolist() for tokens in text_of(prompt, answer)]
    samples = cut(*lists, SPECIAL, rules, np.random.default_rng(seed))
    inside, after = windows(case)
    assert samples == inside + after
    assert all(sample.input_ids.dtype == np.int32 for sample in samples)


@pytest.mark.parametrize("strategy", SLIDING)
def test_the_drawing_is_what_is_done(strategy):
    rules = CutRules(15, strategy, 1, 8, 1)
    lines = []
    for sample in cut(*text_of(24, 20), SPECIAL, rules, None):
        context, learned = parts(sample)
        marks = {**dict.fromkeys(context, "."), **dict.fromkeys(learned, "#")}
        ending = "<eop>" if SPECIAL.eos in learned else ""
        lines.append("".join(marks.get(token, " ") for token in range(44)).rstrip() + ending)
    assert "\n".join(f"    {line}" for line in lines) in cleandoc(slide.__doc__)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((12, "truncation", 9, None, 1), r"min_length 9 .*max_seq_length 12: .*least 13$"),
        ((4, "single_sliding", 1, None, 1), "max_seq_length 4: raise max_seq_length to at least 5"),
        ((12, "single_sliding", 1, 10, 1), "sliding_size 10: .*max_seq_length 12.* up to 9$"),
        ((12, "double_sliding", 1, None, 9), "p 9: .*max_seq_length 12.* up to 8$"),
    ],
)
def test_rules_without_room_are_refused(values, message):
    with pytest.raises(ToolkitError, match=message):
        CutRules(*values)


@pytest.mark.parametrize(("length", "stride"), [(5, 2), (9, 6), (1024, 682), (2048, 1365)])
def test_a_window_moves_on_by_two_thirds_unless_it_is_set(length, stride):
    assert CutRules(length, "single_sliding", 1, None, 1).stride == stride
    assert CutRules(length, "single_sliding", 1, 2, 1).stride == 2


def test_samples_are_equal_where_all_of_them_is():
    one = Sample([1, 2, 3], 1)
    assert one == Sample(np.array([1, 2, 3], dtype=np.int64), 1)
    others = (
        Sample([1, 2], 1),
        Sample([1, 2, 4], 1),
        Sample([1, 2, 3], 2),
        Sample([1, 2, 3], 1, prompt_cut=True),
        Sample([1, 2, 3], 1, window=1),
        [1, 2, 3],
    )
    assert all(one != other for other in others)


def test_an_array_of_the_right_kind_is_kept_without_a_copy():
    ids = np.array([1, 2, 3], dtype=np.int32)
    assert Sample(ids, 1).input_ids is ids
