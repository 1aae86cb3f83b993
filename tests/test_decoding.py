"""The decoding loop against the released tokens and transformers' generate."""

import torch

from chatglm.decoding import generate_tokens
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
