"""The engine over captured steps, whose kernels are plain torch here: what rows are told is the
same as over the model's own forward pass."""

import random

import pytest
import torch

from chatglm import batch_step, steps
from chatglm.building import load_for_inference
from chatglm.row_adapters import RowAdapters, RowLinear
from chatglm.sampling import Sampling
from chatglm.serving.captured import CapturedRunner
from chatglm.tuning.rows import with_row_adapters

from . import plain_kernels
from .served import Told, a_request, serving
from .test_engine import alone, answers, folder, shown, texts, tuned_folders  # noqa: F401


@pytest.fixture(autouse=True)
def steps_on_a_cpu(monkeypatch):
    """Even a few rows step beside the prompts of others, as they do among many."""
    plain_kernels.use(monkeypatch)
    monkeypatch.setattr(batch_step, "ALONE_ROWS", 0)
    tables = steps.rotary_tables
    monkeypatch.setattr(
        steps, "rotary_tables",
        lambda *given, half, device: tables(*given, half=False, device=device),
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(folder):  # noqa: F811
    return load_for_inference(folder, precision="32", device="cpu")[0]


def captured(model, num_pages=64, most_rows=32):
    return CapturedRunner(model, num_pages=num_pages, most_rows=most_rows)


def requests_of(model, count, *, seed=0, longest=70, most_new=40, **more):
    lengths = random.Random(seed).choices(range(1, most_new), k=count)
    return [
        a_request(model, text, new, **more)
        for text, new in zip(texts(count, seed, longest), lengths, strict=True)
    ]


def test_rows_have_the_answers_of_the_plain_model(model):
    requests = requests_of(model, 32)
    expected = [shown(model, alone(model, request)) for request in requests]
    with serving(model, runner=captured(model)) as engine:
        assert [told.text() for told in answers(engine, requests)] == expected
        assert answers(engine, requests[:1])[0].text() == expected[0]
        assert engine.scheduler.pool.num_free == 64


@pytest.mark.parametrize("alone_rows", [0, 8, 32])
def test_prompts_are_read_beside_a_step_once_many_rows_run(model, alone_rows, monkeypatch):
    monkeypatch.setattr(batch_step, "ALONE_ROWS", alone_rows)
    requests = requests_of(model, 32, seed=3, longest=20)
    expected = [shown(model, alone(model, request)) for request in requests]
    runner, joins = captured(model), []
    step, start = runner.step_of_batch, runner.start

    def noted(rows):
        start(rows)
        joins.append((len(runner._rows), len(rows), step._next is not None))

    monkeypatch.setattr(runner, "start", noted)
    with serving(model, runner=runner, prefill_tokens=40) as engine:
        assert [told.text() for told in answers(engine, requests)] == expected
    assert all(beside == (running > alone_rows) for running, _, beside in joins)
    assert all(joining <= batch_step.MOST_PROMPTS_BESIDE for _, joining, beside in joins if beside)
    assert alone_rows == 32 or any(joining > 1 and beside for _, joining, beside in joins)


@pytest.mark.parametrize("most_rows", [3, 8])
def test_with_few_pages_and_places_the_answers_are_the_same(model, most_rows):
    requests = [a_request(model, text, 50) for text in texts(14, longest=60)]
    expected = [shown(model, alone(model, request)) for request in requests]
    runner = captured(model, 5, most_rows)
    with serving(model, num_pages=5, most_running=most_rows, runner=runner) as engine:
        assert [told.text() for told in answers(engine, requests)] == expected
        assert most_rows < 8 or engine.metrics._put_back._value.get() > 0


def test_virtual_tokens_stand_before_every_row(tuned_folders):  # noqa: F811
    tuned = load_for_inference(tuned_folders["ptuning"], precision="32", device="cpu")[0]
    requests = requests_of(tuned, 8, seed=7)
    expected = [shown(tuned, alone(tuned, request)) for request in requests]
    with serving(tuned, num_pages=6, runner=captured(tuned, 6)) as engine:
        assert [told.text() for told in answers(engine, requests)] == expected


def test_each_row_has_its_own_adapter(tuned_folders):  # noqa: F811
    def mixed():
        return with_row_adapters(load_for_inference(
            tuned_folders["lora"], precision="32", device="cpu",
            adapters={"rslora": tuned_folders["rslora"]},
        )[0])  # fmt: skip

    model = mixed()
    requests = [
        a_request(model, text, 12, adapter=[None, "default", "rslora"][number % 3])
        for number, text in enumerate(texts(12, seed=6))
    ]
    with serving(model) as engine:
        expected = [told.text() for told in answers(engine, requests)]
    assert len(set(expected)) > 8
    with serving(model, runner=captured(model, most_rows=5), most_running=5) as engine:
        assert [told.text() for told in answers(engine, requests)] == expected


def test_a_draw_goes_by_the_row_s_seed_and_length_alone(model):
    drawn = Sampling(top_k=5, temperature=1.0, top_p=1.0)
    requests = [a_request(model, text, 30, drawn, seed=n) for n, text in enumerate(texts(9))]
    with serving(model, runner=captured(model)) as engine:
        together = [told.text() for told in answers(engine, requests)]
        assert [answers(engine, [request])[0].text() for request in requests] == together
    with serving(model, num_pages=5, runner=captured(model, 5)) as engine:
        assert [told.text() for told in answers(engine, requests)] == together


def test_random_cancels_leave_the_others_as_they_are(model):
    chance = random.Random(8)
    requests = requests_of(model, 40, seed=2, most_new=30)
    expected = [shown(model, alone(model, request)) for request in requests]
    runner = captured(model, 12, 8)
    with serving(model, num_pages=12, most_running=8, runner=runner) as engine:
        kept = []
        for request, text in zip(requests, expected, strict=True):
            told = Told(1)
            rows = engine.submit([request], told)
            if chance.random() < 0.3:
                engine.cancel(rows)
            else:
                kept.append((told, text))
        assert all(told.wait().text() == text for told, text in kept)


def test_a_place_without_a_row_is_passed_by(model):
    step = batch_step.BatchStep(model, most_rows=4, num_pages=3)
    before = [tensor.clone() for tensor in (step.tokens, step.counts.lengths)]
    with torch.inference_mode():
        step.warm_up()
    after = (step.tokens, step.counts.lengths)
    assert all(map(torch.equal, after, before)) and (step.counts.steps == -1).all()


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 4), (9, 12), (32, 32), (33, 36)])
def test_a_batch_takes_the_smallest_graph_that_holds_it(rows, size):
    assert batch_step.batch_size(rows) == size


@pytest.mark.parametrize("index", [[0, 1], [1, 0]])
def test_an_adapter_that_overflows_leaves_the_tokens_of_others_alone(index):
    linear, down, up = torch.nn.Linear(4, 6), torch.randn(3, 2, 4), torch.randn(3, 6, 2)
    down[0], up[0], down[2] = 0, 0, float("inf")
    adapters = RowAdapters(["one", "two"], torch.device("cpu"))
    both, x = RowLinear(linear, down, up, adapters), torch.randn(2, 4)
    adapters.index = torch.tensor(index)
    expected = both.linear(x) + both.added(x[:, None], adapters.index)[:, 0]
    torch.testing.assert_close(both(x), expected)
    adapters.index = torch.tensor([index[0], 2])
    torch.testing.assert_close(both(x)[0], expected[0])
