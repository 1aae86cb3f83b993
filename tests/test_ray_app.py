"""Two replicas of the server under Ray Serve, with a tiny model, through Ray's proxy."""

import asyncio
import concurrent.futures
import json
import logging
import re
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
from safetensors.torch import load_file, save_file

from chatglm.building import load_for_inference
from chatglm.errors import ToolkitError

from .processes import free_port
from .tiny_weights import CONTROL, write_weights

serve = pytest.importorskip("ray.serve")
ray_app = pytest.importorskip("chatglm.serving.ray_app")

QUESTION = "三上下丌不与"  # the tiny vocabulary has these
KEY = "one-of-us"
LONG = 3000
"""Tokens of an answer that lasts for many seconds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights that read long texts and never choose a control token, such as the end."""
    folder = write_weights(tmp_path_factory.mktemp("ray"), std=0.36)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"][list(CONTROL)] = 0  # others have more, whatever the hidden state
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_sequence_length": 2 * LONG}))
    return str(folder)


@pytest.fixture(scope="module")
def address(folder):
    """Of Ray's proxy, before two replicas."""
    import ray

    port = free_port()
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    arguments = {"checkpoint": folder, "num_replicas": "2", "device": "cpu", "max_running": "4",
                 "kv_cache_tokens": 4 * LONG, "grace_seconds": 5}  # fmt: skip
    try:
        ray.init(num_cpus=2, include_dashboard=False, **quiet)
        serve.start(http_options={"port": port})
        with pytest.MonkeyPatch.context() as environment:  # of this process, not of the replicas
            environment.setenv("CHATGLM_API_KEYS", KEY)
            application = ray_app.build(arguments)
        serve.run(application)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def asked(**more):
    messages = [{"role": "user", "content": QUESTION}]
    return {"model": "chatglm-6b", "messages": messages, "temperature": 0, **more}


def metrics(address):
    """{replica: {name: value}}, each known by the time of its start.

    Of two, Ray asks the one that has less to do: while one is busy it is never asked.
    """
    replicas = {}
    deadline = time.monotonic() + 20
    while len(replicas) < 2:
        assert time.monotonic() < deadline, "only one replica answers"
        text = httpx.get(f"{address}/metrics").text
        values = {name: float(value) for name, value in re.findall(r"^(\w\S*) (\S+)$", text, re.M)}
        replicas[values["chatglm_generated_tokens_created"]] = values
    return replicas


def total(address, name):
    return sum(values.get(name, 0) for values in metrics(address).values())


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_stream_through_the_proxy_is_the_answer_of_the_model(folder, address, client):
    model, tokenizer = load_for_inference(folder, precision="32", device="cpu")
    text, _ = model.chat(tokenizer, QUESTION, do_sample=False, max_new_tokens=12)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = client.chat.completions.create(**asked(max_tokens=12, **options))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    assert pieces[-1].choices[0].finish_reason == "length" and last.usage.completion_tokens == 12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_replica_asks_for_the_keys_of_the_one_who_started_them(client):
    for _ in range(8):
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="none").models.list()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_both_replicas_get_work(address, client):
    before = metrics(address)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(lambda _: client.chat.completions.create(**asked(max_tokens=100)), range(12))
        )
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    name = "chatglm_generated_tokens_total"
    gained = [values[name] - before[one][name] for one, values in metrics(address).items()]
    assert sum(gained) == 1200 and min(gained) >= 200


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(address, client, stream):
    cancelled = 'chatglm_requests_total{end="cancelled"}'
    generated = "chatglm_generated_tokens_total"
    before, tokens = total(address, cancelled), total(address, generated)
    if stream:
        with client.chat.completions.create(**asked(max_tokens=LONG, stream=True)) as pieces:
            assert len(list(zip(range(5), pieces, strict=False))) == 5
    else:
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(**asked(max_tokens=LONG), timeout=0.5)
    wait_until(lambda: total(address, cancelled) == before + 1)
    written = total(address, generated)
    assert 0 < written - tokens < LONG / 2  # so what was read came long before the end
    time.sleep(0.2)
    assert total(address, generated) == written


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_replica": 2}, "Did you mean 'num_replicas'"),
        ({"num_replicas": 0}, "num_replicas 0"),
        ({"checkpoint": "/tmp", "port": 80}, "serve start --http-host"),
        ({"max_running": "many"}, "max_running"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_started(arguments, said):
    with pytest.raises(ToolkitError, match=said):
        ray_app.build(arguments)


def test_a_replica_is_healthy_once_it_is_ready_and_as_long_as_its_engine_lives():
    engine = SimpleNamespace(is_alive=True, failure=None)
    api = SimpleNamespace(is_ready=False, failure=None, served=SimpleNamespace(engine=engine))
    replica = ray_app.ChatGLM()
    replica.app = SimpleNamespace(state=SimpleNamespace(api=api))

    async def asked_once():
        check = asyncio.create_task(replica.check_health())
        await asyncio.sleep(0.1)
        assert not check.done()
        api.is_ready = True
        await check

    asyncio.run(asked_once())
    api.failure = "the warming up failed"
    with pytest.raises(RuntimeError, match="the warming up failed"):
        asyncio.run(replica.check_health())
    api.failure, engine.is_alive, engine.failure = None, False, "RuntimeError: CUDA error"
    with pytest.raises(RuntimeError, match="CUDA error"):
        asyncio.run(replica.check_health())
