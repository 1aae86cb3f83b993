"""Choosing the next token: the guard, greedy, top-p, seeds, refused settings."""

import pytest
import torch

from chatglm.errors import ToolkitError
from chatglm.sampling import GUARD_TOKEN, Sampling, choose_tokens, guard_scores

BROKEN = [float("nan"), float("inf"), float("-inf")]


def choose(scores, sampling, *, seed=0, so_far=None):
    tokens = torch.zeros(len(scores), 1, dtype=torch.long) if so_far is None else so_far
    generator = torch.Generator().manual_seed(seed)
    return choose_tokens(scores, tokens, sampling, sampling.processors(), generator=generator)


def scores_for(*chances):
    """Scores of 40 tokens of which the first have these chances and the rest none to speak of."""
    scores = torch.full((1, 40), -1e4)
    scores[0, : len(chances)] = torch.log(torch.tensor(chances))
    return scores


def random_scores(rows=4, seed=0):
    return torch.randn(rows, 40, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("do_sample", [True, False])
def test_a_broken_row_yields_token_5_and_leaves_the_others_alone(value, do_sample):
    sampling = Sampling(do_sample=do_sample, top_k=1)
    scores = random_scores()
    expected = choose(scores, sampling)
    scores[2, 7] = value
    expected[2] = GUARD_TOKEN
    assert GUARD_TOKEN == 5
    assert torch.equal(choose(scores, sampling), expected)


@pytest.mark.parametrize("value", BROKEN)
def test_a_broken_row_yields_token_5_under_the_default_sampling(value):
    scores = random_scores()
    scores[1] = value
    assert all(choose(scores, Sampling(), seed=seed)[1] == 5 for seed in range(10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_guard_leaves_whole_rows_as_they_are(dtype):
    scores = random_scores().to(dtype)
    assert torch.equal(guard_scores(scores), scores)
    scores[0, 0] = torch.nan
    assert torch.isfinite(guard_scores(scores)).all()


def test_greedy_takes_the_likeliest():
    scores = random_scores()
    assert torch.equal(choose(scores, Sampling(do_sample=False)), scores.argmax(dim=-1))


def test_top_p_never_leaves_the_smallest_set_that_reaches_it():
    scores = scores_for(0.5, 0.3, 0.15, 0.05)
    drawn = {
        int(choose(scores, Sampling(top_p=0.7, temperature=1.0, top_k=0), seed=seed))
        for seed in range(200)
    }
    assert drawn == {0, 1}


def test_top_k_keeps_the_k_likeliest():
    scores = scores_for(0.3, 0.25, 0.25, 0.2)
    sampling = Sampling(top_p=1.0, temperature=1.0, top_k=1)
    assert {int(choose(scores, sampling, seed=seed)) for seed in range(50)} == {0}


def test_frequencies_follow_the_scores():
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05])
    scores = scores_for(*chances.tolist()).expand(20000, -1)
    drawn = choose(scores, Sampling(top_p=1.0, temperature=1.0, top_k=0))
    counts = torch.bincount(drawn, minlength=4)[:4] / len(scores)
    assert (counts - chances).abs().max() < 0.015


def test_equal_seeds_give_equal_tokens():
    scores = torch.zeros(64, 40)
    assert torch.equal(choose(scores, Sampling(), seed=3), choose(scores, Sampling(), seed=3))
    assert not torch.equal(choose(scores, Sampling(), seed=3), choose(scores, Sampling(), seed=4))


def test_the_penalty_makes_seen_tokens_less_likely():
    scores = torch.zeros(1, 40)
    scores[0, :2] = torch.tensor([2.0, 1.9])
    sampling = Sampling(do_sample=False, repetition_penalty=1.5)
    assert int(choose(scores, sampling, so_far=torch.tensor([[0]]))) == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": -0.1}, {"top_p": float("nan")},
        {"temperature": 0.0}, {"temperature": -1.0}, {"temperature": float("nan")},
        {"top_k": -1}, {"repetition_penalty": 0.0}, {"repetition_penalty": -1.0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(setting):
    with pytest.raises(ToolkitError, match=next(iter(setting))):
        Sampling(**setting)


def test_temperature_is_not_looked_at_without_sampling():
    Sampling(do_sample=False, temperature=0.0)
