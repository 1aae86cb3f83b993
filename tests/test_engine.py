"""The engine over tiny models: a row's answer is its own, whoever else is served."""

import random
import threading
import time

import pytest
import torch

from chatglm.building import load_for_inference
from chatglm.checkpoints import save_trained
from chatglm.errors import ToolkitError
from chatglm.sampling import Sampling
from chatglm.serving.engine import EngineBusy, EngineStopped
from chatglm.serving.runner import PlainRunner
from chatglm.tuning.rows import with_row_adapters

from .served import Told, a_request, serving
from .tiny_weights import build, settings, write_weights

DRAWN = Sampling(top_k=20, temperature=1.5, top_p=0.95)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_weights(tmp_path_factory.mktemp("served"), std=0.36))


@pytest.fixture(scope="module")
def model(folder):
    return load_for_inference(folder, precision="32", device="cpu")[0]


def texts(count, seed=0, longest=70):
    chance = random.Random(seed)
    return [[chance.randrange(6, 299) for _ in range(chance.randrange(1, longest))]
            for _ in range(count)]  # fmt: skip


def alone(model, request):
    """The tokens of the plain forward pass, without a cache."""
    ids = list(request.prompt)
    context = torch.tensor([len(ids) - 1])
    for _ in range(request.max_new_tokens):
        with torch.inference_mode():
            scores = model(input_ids=torch.tensor([ids]), context_lengths=context,
                           mask_positions=context - 1, use_cache=False).logits[0, -1]  # fmt: skip
        ids.append(int(scores.argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return ids[len(request.prompt) :]


def shown(model, tokens):
    return "".join(f"{token} " for token in tokens if token != model.config.eos_token_id).strip()


def answers(engine, requests):
    everyone = [Told(1) for _ in requests]
    for request, told in zip(requests, everyone, strict=True):
        engine.submit([request], told)
    return [told.wait() for told in everyone]


def test_a_greedy_answer_is_that_of_the_plain_model_alone_and_among_others(model):
    lengths = random.Random(1).choices(range(1, 40), k=32)
    requests = [a_request(model, text, new) for text, new in zip(texts(32), lengths, strict=True)]
    expected = [shown(model, alone(model, request)) for request in requests]
    assert len(set(expected)) == len(expected)
    with serving(model) as engine:
        assert [told.text() for told in answers(engine, requests)] == expected
        for request, text in list(zip(requests, expected, strict=True))[:4]:
            assert answers(engine, [request])[0].text() == text


def test_with_few_pages_rows_go_back_and_their_answers_are_the_same(model):
    requests = [a_request(model, text, 50) for text in texts(12, longest=60)]
    expected = [shown(model, alone(model, request)) for request in requests]
    with serving(model, num_pages=5) as engine:
        assert [told.text() for told in answers(engine, requests)] == expected
        assert engine.metrics._put_back._value.get() > 0


@pytest.mark.parametrize("seed", range(3))
def test_random_arrivals_and_cancels_leave_the_answers_and_return_the_pages(seed, tuned_folders):
    chance, methods = random.Random(seed), ("lora", "rslora")
    peft = load_tuned(tuned_folders, methods)
    requests = [
        a_request(peft.get_base_model(), text, chance.randrange(1, 30),
                  adapter=chance.choice([None, "default", "rslora"]))
        for text in texts(40, seed=2 + seed)
    ]  # fmt: skip
    expected = [alone_with_adapter(peft, request) for request in requests]
    mixed = with_row_adapters(load_tuned(tuned_folders, methods))
    with serving(mixed, num_pages=12, most_running=8) as engine:
        kept = []
        for request, text in zip(requests, expected, strict=True):
            told = Told(1)
            rows = engine.submit([request], told)
            time.sleep(chance.random() * 0.01)
            if chance.random() < 0.3:
                engine.cancel(rows)
            else:
                kept.append((told, text))
        for told, text in kept:
            assert told.wait().text() == text
        wait_until(lambda: engine.scheduler.pool.num_free == 12)
        assert not engine.scheduler.running and not engine.scheduler.waiting


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_seed_makes_a_sampled_answer_the_same_alone_and_among_others(model):
    requests = [a_request(model, text, 20, DRAWN, seed=number) for number, text in
                enumerate(texts(10, seed=4))]  # fmt: skip
    with serving(model) as engine:
        together = [told.text() for told in answers(engine, requests)]
        assert [answers(engine, [request])[0].text() for request in requests] == together
    with serving(model, num_pages=5) as engine:  # some go back and come back
        assert [told.text() for told in answers(engine, requests)] == together
    other = a_request(model, texts(10, seed=4)[0], 20, DRAWN, seed=99)
    with serving(model) as engine:
        assert answers(engine, [other])[0].text() != together[0]


@pytest.fixture(scope="module")
def tuned_folders(tmp_path_factory, folder):
    """{method: folder} of what training would save."""
    folders = {}
    for method in ("lora", "rslora", "adalora", "ptuning"):
        chosen = settings(folder, method)
        folders[method] = str(tmp_path_factory.mktemp("tuned") / method)
        save(build(chosen), chosen, folders[method])
    return folders


def save(tuned, chosen, folder):
    state = {name: tensor.detach() for name, tensor in tuned.state_dict().items()}
    save_trained(tuned, state, chosen, folder, tokenizer=None)


def load_tuned(folders, methods):
    """The first method's adapter, "default", and those of the others by their names."""
    first, *others = methods
    return load_for_inference(
        folders[first], precision="32", device="cpu",
        adapters={name: folders[name] for name in others},
    )[0]  # fmt: skip


def alone_with_adapter(peft, request):
    """As PEFT answers."""
    if request.adapter is None:
        peft.disable_adapter_layers()
    else:
        peft.enable_adapter_layers()
        peft.set_adapter(request.adapter)
    return shown(peft.get_base_model(), alone(peft, request))


@pytest.mark.parametrize("methods", [("lora", "rslora"), ("adalora",)])
def test_each_row_has_its_own_adapter(methods, tuned_folders):
    peft, names = load_tuned(tuned_folders, methods), [None, "default", *methods[1:]]
    requests = [
        a_request(peft.get_base_model(), text, 12, adapter=names[number % len(names)])
        for number, text in enumerate(texts(12, seed=6))
    ]
    expected = [alone_with_adapter(peft, request) for request in requests]
    assert len(set(expected)) == len(expected)
    with serving(with_row_adapters(load_tuned(tuned_folders, methods))) as engine:
        assert [told.text() for told in answers(engine, requests)] == expected


def test_an_adapter_with_biases_of_its_own_is_refused(folder):
    tuned = build(settings(folder, "lora"))
    tuned.peft_config["default"].lora_bias = True
    with pytest.raises(ToolkitError, match="changes biases"):
        with_row_adapters(tuned)


@pytest.mark.parametrize("method", ["dora", "biases", "saved modules"])
def test_an_adapter_that_changes_more_than_products_is_refused(method, folder):
    with pytest.raises(ToolkitError, match=r"'default' .* serve it alone, or merge it"):
        with_row_adapters(build(settings(folder, method)))


def test_virtual_tokens_stand_before_every_row(tuned_folders):
    tuned = load_for_inference(tuned_folders["ptuning"], precision="32", device="cpu")[0]
    requests = [a_request(tuned, text, 15) for text in texts(8, seed=7)]
    expected = [shown(tuned, alone(tuned, request)) for request in requests]
    with serving(tuned, num_pages=6) as engine:
        assert [told.text() for told in answers(engine, requests)] == expected


def test_a_full_queue_is_busy_and_says_when_to_come_back(model):
    release = threading.Event()
    with serving(model, runner=Held(model, release), most_running=1, most_waiting=2) as engine:
        told = [Told(1) for _ in range(3)]
        engine.submit([a_request(model, [9], 3)], told[0])
        wait_until(lambda: engine._num_waiting == 0)
        for one in told[1:]:
            engine.submit([a_request(model, [9], 3)], one)
        with pytest.raises(EngineBusy) as busy:
            engine.submit([a_request(model, [9], 3)], Told(1))
        assert 1 <= busy.value.retry_after_seconds <= 60
        release.set()
        assert all(one.wait().last().finish_reason for one in told)


class Held(PlainRunner):
    """Waits before each step."""

    def __init__(self, model, release):
        super().__init__(model, num_pages=64)
        self.release = release

    def step(self, rows):
        assert self.release.wait(30)
        super().step(rows)


def test_a_deadline_ends_a_row_that_runs_and_one_that_waits(model):
    release = threading.Event()
    with serving(model, runner=Held(model, release), most_running=1) as engine:
        told = [Told(1), Told(1)]
        for one in told:
            soon = time.monotonic() + 0.05
            engine.submit([a_request(model, [9], 20, deadline=soon)], one)
        time.sleep(0.1)
        release.set()
        assert ["deadline" in one.wait().last().error for one in told] == [True, True]
        wait_until(lambda: engine.scheduler.pool.num_free == 64)


class Failing(PlainRunner):
    """Fails on rows whose prompt begins with 13, and in as many steps as it is told."""

    failing_steps = 0

    def start(self, rows):
        if any(row.request.prompt[0] == 13 for row in rows):
            raise ZeroDivisionError("thirteen")
        super().start(rows)

    def step(self, rows):
        if self.failing_steps:
            self.failing_steps -= 1
            raise ZeroDivisionError("a step")
        super().step(rows)


def test_an_error_in_one_prompt_harms_no_other(model):
    requests = [a_request(model, [first, 20, 21], 6) for first in (10, 13, 11)]
    with serving(model, runner=Failing(model, num_pages=64)) as engine:
        told = answers(engine, requests)
        assert told[1].last().error == "ZeroDivisionError: thirteen"
        for number in (0, 2):
            assert told[number].text() == shown(model, alone(model, requests[number]))


def test_a_failed_step_ends_its_rows_and_the_next_ones_are_served(model):
    runner = Failing(model, num_pages=64)
    with serving(model, runner=runner) as engine:
        runner.failing_steps = 1
        assert answers(engine, [a_request(model, [10], 6)])[0].last().error
        assert answers(engine, [a_request(model, [10], 6)])[0].last().finish_reason
        assert engine.is_alive


def test_steps_that_always_fail_stop_the_engine_with_the_reason(model):
    runner = Failing(model, num_pages=64)
    with serving(model, runner=runner) as engine:
        runner.failing_steps = 99
        for _ in range(3):
            assert answers(engine, [a_request(model, [10], 6)])[0].last().error
        wait_until(lambda: not engine.is_alive)
        with pytest.raises(EngineStopped, match="a step"):
            engine.submit([a_request(model, [10], 6)], Told(1))


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(model):
    request = a_request(model, [30, 31], 20)
    tokens = alone(model, request)
    stop = f"{tokens[3]} "
    first = "".join(f"{token} " for token in tokens).find(stop)
    with serving(model) as engine:
        told = answers(engine, [a_request(model, [30, 31], 20, stops=(stop,))])[0]
        assert told.text() == "".join(f"{token} " for token in tokens)[:first]
        assert told.last().finish_reason == "stop" and told.last().num_tokens <= 5


def test_stopping_lets_what_runs_end_and_takes_nothing_more(model):
    with serving(model) as engine:
        told = Told(1)
        engine.submit([a_request(model, [40], 30)], told)
        engine.stop(grace_seconds=30)
        assert told.last().finish_reason == "length" or told.last().finish_reason == "stop"
        with pytest.raises(EngineStopped):
            engine.submit([a_request(model, [40], 3)], Told(1))


def test_a_grace_that_is_over_ends_the_rest_with_the_reason(model):
    release = threading.Event()
    with serving(model, runner=Held(model, release)) as engine:
        told = Told(1)
        engine.submit([a_request(model, [40], 30)], told)
        threading.Timer(0.3, release.set).start()
        engine.stop(grace_seconds=0.05)
        assert told.last().error == "the server is stopping"
