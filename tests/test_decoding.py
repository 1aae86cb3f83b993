"""The decoding loop against the released tokens and transformers' generate."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatglm.decoding import generate_tokens
from chatglm.drafts import checked_tokens
from chatglm.errors import ToolkitError
from chatglm.sampling import Sampling

GREEDY = Sampling(do_sample=False)


def decode(model, input_ids, **options):
    settings = {"max_new_tokens": 80 - input_ids.shape[1], "sampling": GREEDY,
                "eos_token_ids": [305]}  # fmt: skip
    tokens = list(generate_tokens(model, input_ids, **{**settings, **options}))
    return torch.cat((input_ids, torch.stack(tokens, dim=1)), dim=1)


def test_greedy_tokens_are_the_released_ones(released, golden):
    output = decode(released, golden["greedy.input_ids"])
    assert torch.equal(output, golden["greedy.output_ids"])


def test_greedy_tokens_of_a_padded_batch_are_the_released_ones(released, golden):
    ids = golden["greedy_batch.input_ids"]
    output = decode(released, ids, attention_mask=(ids != 3).long())
    assert torch.equal(output, golden["greedy_batch.output_ids"])


def test_a_row_that_has_ended_goes_on_with_pads(released, golden):
    ids = golden["greedy_batch.input_ids"]
    answers = golden["greedy_batch.output_ids"][:, ids.shape[1] :]
    end = int(answers[0, 4])
    output = decode(
        released, ids, attention_mask=(ids != 3).long(), eos_token_ids=[end], max_new_tokens=12
    )
    for row, answer in zip(output[:, ids.shape[1] :].tolist(), answers.tolist(), strict=True):
        wanted = answer[:12]
        if end in wanted:
            length = wanted.index(end) + 1
            wanted = wanted[:length] + [3] * (12 - length)
        assert row == wanted[: len(row)]


def test_equal_seeds_draw_equal_tokens(released, golden):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return decode(
            released, golden["greedy.input_ids"], sampling=Sampling(temperature=2.0, top_p=0.95),
            generator=generator, max_new_tokens=8,
        )  # fmt: skip

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


class Echo:
    """A checker that repeats the prompt over and over, and counts its passes."""

    def __init__(self, prompt):
        self.prompt, self.length, self.passes = prompt, 0, 0

    def _after(self, position):
        return self.prompt[position % len(self.prompt)]

    def start(self):
        return self._after(0)

    def check(self, tokens):
        self.passes += 1
        assert tokens[0] == self._after(self.length)
        return [self._after(self.length + n + 1) if t == self._after(self.length + n) else 7
                for n, t in enumerate(tokens)]  # fmt: skip

    def keep(self, number):
        self.length += number


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 60))
def test_whatever_is_drafted_the_tokens_are_the_likeliest_ones(prompt, most_drafted, wanted):
    echo = Echo(prompt)
    found = list(checked_tokens(echo, prompt, most_drafted=most_drafted, max_new_tokens=wanted))
    assert found == [prompt[n % len(prompt)] for n in range(wanted)]


def test_a_repetition_takes_few_passes():
    echo = Echo(list(range(50)))
    assert len(list(checked_tokens(echo, list(range(50)), most_drafted=7, max_new_tokens=50))) == 50
    assert echo.passes < 12


@pytest.mark.parametrize("most_drafted", [1, 3, 7])
def test_prompt_lookup_gives_the_released_tokens_in_fewer_passes(released, golden, most_drafted):
    ids = golden["greedy.input_ids"]
    passes = []
    handle = released.register_forward_hook(lambda *_: passes.append(1))
    output = decode(released, ids, prompt_lookup_tokens=most_drafted)
    handle.remove()
    assert torch.equal(output, golden["greedy.output_ids"])
    assert len(passes) < output.shape[1] - ids.shape[1]


@pytest.mark.parametrize(("options", "named"), [
    ({"sampling": Sampling()}, "do_sample"),
    ({"sampling": Sampling(do_sample=False, repetition_penalty=1.1)}, "repetition_penalty"),
    ({"prompt_lookup_tokens": 16}, "0 (off) to 15"),
    ({"prompt_lookup_tokens": -1}, "0 (off) to 15"),
])  # fmt: skip
def test_prompt_lookup_is_refused_with_what_it_cannot_have(released, golden, options, named):
    with pytest.raises(ToolkitError, match=re.escape(named)):
        decode(released, golden["greedy.input_ids"], **{"prompt_lookup_tokens": 4, **options})


def test_prompt_lookup_takes_no_pads(released, golden):
    ids = golden["greedy.input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with pytest.raises(ToolkitError, match="pads: give the row without them"):
        decode(released, ids, attention_mask=mask, prompt_lookup_tokens=4)


def test_prompt_lookup_takes_one_row_at_a_time(released, golden):
    with pytest.raises(ToolkitError, match="rows: give one at a time"):
        decode(released, golden["greedy_batch.input_ids"], prompt_lookup_tokens=4)
