"""The engine over captured steps and their kernels, on a GPU."""

import random

import pytest
import torch

from chatglm.decoding import generate_tokens
from chatglm.row_adapters import RowAdapters, RowLinear
from chatglm.sampling import Sampling
from chatglm.serving.captured import CapturedRunner
from chatglm.serving.request import Request

from .served import Told, serving
from .test_steps import EOS, build, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GREEDY = Sampling(do_sample=False)


def requests_of(count, sampling=GREEDY, **more):
    chance = random.Random(count)
    return [
        Request(tuple(prompt(chance.randrange(3, 200), seed)), chance.randrange(1, 60), sampling,
                seed=seed, **more)
        for seed in range(count)
    ]  # fmt: skip


def answers(engine, requests):
    everyone = [Told(1) for _ in requests]
    for request, told in zip(requests, everyone, strict=True):
        engine.submit([request], told)
    return [told.wait(120).text() for told in everyone]


def alone(model, request):
    tokens = generate_tokens(
        model, torch.tensor([request.prompt], device="cuda"), eos_token_ids=[EOS],
        max_new_tokens=request.max_new_tokens, sampling=request.sampling,
    )  # fmt: skip
    return "".join(f"{int(t[0])} " for t in tokens if int(t[0]) != EOS).strip()


def engine_of(model, *, num_pages=128, most_rows=6, **options):
    runner = CapturedRunner(model, num_pages=num_pages, most_rows=most_rows)
    return serving(model, num_pages=num_pages, most_running=most_rows, runner=runner, **options)


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_rows_have_the_answers_that_they_have_alone(bits):
    """To the last bit up to eight rows, whose products are those of one row; those of a chat, whose
    prompt goes through other kernels, but for where two tokens are about as likely."""
    model, _ = build(bits)
    requests = requests_of(20)
    with engine_of(model, prefill_tokens=1) as engine:  # prompts one by one
        together = answers(engine, requests)
        assert [answers(engine, [request])[0] for request in requests] == together
        assert engine.scheduler.pool.num_free == 128
    assert agreement(together, [alone(model, request) for request in requests]) > 0.8


def agreement(found, expected):
    """The share of tokens up to the first that differs, of all."""
    equal = total = 0
    for pair in zip(found, expected, strict=True):
        tokens = [text.split() for text in pair]
        same = [a == b for a, b in zip(*tokens, strict=False)]
        equal += len(same) if all(same) else same.index(False)
        total += max(map(len, tokens))
    return equal / total


def test_a_seed_repeats_an_answer_whoever_else_is_served():
    model, _ = build()
    requests = requests_of(12, Sampling(top_k=50, temperature=1.5, top_p=0.95))
    with engine_of(model, prefill_tokens=1) as engine:
        together = answers(engine, requests)
        assert [answers(engine, [request])[0] for request in requests] == together


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_many_rows_that_step_beside_prompts_have_about_their_own_answers(bits):
    """Their products are a library's: where two tokens are about as likely, either may come."""
    model, _ = build(bits)
    requests = requests_of(60)
    expected = [alone(model, request) for request in requests]
    with engine_of(model, num_pages=512, most_rows=24, prefill_tokens=300) as engine:
        step, beside = engine.runner.step_of_batch, []
        join = step.join
        step.join = lambda *given: join(*given) or beside.append(step._next is not None)
        together = answers(engine, requests)
        assert engine.scheduler.pool.num_free == 512
    assert sum(beside) > 5
    assert agreement(together, expected) > 0.7


def test_with_few_pages_every_row_ends_and_the_pages_come_back():
    model, _ = build(4)
    with engine_of(model, num_pages=9, most_rows=8) as engine:
        texts = answers(engine, requests_of(30))
        assert all(texts) and engine.scheduler.pool.num_free == 9


def test_virtual_tokens_stand_before_every_row():
    model, _ = build(pre_seq_len=70)
    requests = requests_of(6)
    expected = [alone(model, request) for request in requests]
    with engine_of(model, prefill_tokens=1) as engine:
        assert agreement(answers(engine, requests), expected) > 0.5


def test_adapters_are_added_for_their_rows_alone():
    model, _ = build()
    plain = [alone(model, request) for request in requests_of(4)]
    adapters = RowAdapters(["one"], torch.device("cuda"))
    for layer in model.transformer.layers:
        linear = layer.attention.query_key_value
        down = torch.randn(2, 8, linear.in_features, device="cuda") * 0.05
        up = torch.randn(2, linear.out_features, 8, device="cuda") * 0.2
        down[0], up[0] = 0, 0
        layer.attention.query_key_value = RowLinear(linear, down, up, adapters)
    model.row_adapters = adapters
    with engine_of(model, prefill_tokens=1) as engine:
        assert answers(engine, requests_of(4)) == plain
        tuned = answers(engine, requests_of(4, adapter="one"))
        mixed = [request for pair in zip(requests_of(4), requests_of(4, adapter="one"),
                                         strict=True) for request in pair]  # fmt: skip
        both = answers(engine, mixed)
    assert all(a != b for a, b in zip(tuned, plain, strict=True))
    assert both[0::2] == plain and both[1::2] == tuned
