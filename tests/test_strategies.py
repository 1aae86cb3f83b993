"""What a cut leaves, for every pair of lengths."""

from hypothesis import given
from hypothesis import strategies as st

from chatglm.strategies import SpecialTokens, truncate

SPECIAL = SpecialTokens(gmask=-1, bos=-2, eos=-3)


@st.composite
def cuts(draw):
    least = draw(st.integers(1, 12))
    return {
        "prompt": list(range(draw(st.integers(0, 60)))),
        "answer": list(range(1000, 1000 + draw(st.integers(0, 60)))),
        "max_seq_length": draw(st.integers(least + 4, 80)),
        "ensure_answer_min_length": least,
    }


def cut(prompt, answer, **options):
    sample = truncate(prompt, answer, SPECIAL, **options)
    middle = sample.context_length
    prompt_part, learned = sample.input_ids[: middle - 1], sample.input_ids[middle + 1 :]
    return sample, prompt_part, learned


@given(cuts())
def test_a_sample_is_never_longer_than_max_seq_length(case):
    assert len(cut(**case)[0].input_ids) <= case["max_seq_length"]


@given(cuts())
def test_the_context_ends_with_gmask_and_sop_follows_it(case):
    sample = cut(**case)[0]
    middle = sample.context_length
    assert sample.input_ids[middle - 1 : middle + 1] == [SPECIAL.gmask, SPECIAL.bos]
    assert sample.input_ids.count(SPECIAL.gmask) == sample.input_ids.count(SPECIAL.bos) == 1


@given(cuts())
def test_eop_ends_the_sample_if_and_only_if_the_answer_is_whole(case):
    sample, _, learned = cut(**case)
    whole = learned == [*case["answer"], SPECIAL.eos]
    assert (SPECIAL.eos in sample.input_ids) == whole == (not sample.answer_cut)


@given(cuts())
def test_the_learned_tokens_are_a_beginning_of_the_answer(case):
    learned = [token for token in cut(**case)[2] if token != SPECIAL.eos]
    assert learned == case["answer"][: len(learned)]
    assert len(learned) >= min(case["ensure_answer_min_length"], len(case["answer"]))


@given(cuts())
def test_the_prompt_keeps_its_newest_tokens(case):
    sample, kept, _ = cut(**case)
    assert kept == case["prompt"][len(case["prompt"]) - len(kept) :]
    assert sample.prompt_cut == (len(kept) < len(case["prompt"]))


@given(cuts())
def test_nothing_is_lost_when_it_fits(case):
    sample, prompt, learned = cut(**case)
    if len(case["prompt"]) + len(case["answer"]) + 3 <= case["max_seq_length"]:
        assert prompt == case["prompt"] and learned == [*case["answer"], SPECIAL.eos]
        assert not sample.prompt_cut and not sample.answer_cut


@given(cuts())
def test_the_prompt_is_cut_only_when_the_answer_is_down_to_its_least(case):
    sample, _, learned = cut(**case)
    if sample.prompt_cut:
        kept = [token for token in learned if token != SPECIAL.eos]
        assert len(kept) == min(case["ensure_answer_min_length"], len(case["answer"]))
