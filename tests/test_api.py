"""The HTTP application over a tiny model, through real sockets."""

import contextlib
import json
import re
import socket
import threading
import time

import httpx
import openai
import pytest
import uvicorn

from chatglm.building import load_for_inference
from chatglm.checkpoints import save_trained
from chatglm.errors import ToolkitError
from chatglm.prompts import build_prompt
from chatglm.serving.api import build_app
from chatglm.serving.keys import read_keys
from chatglm.serving.runner import PlainRunner
from chatglm.serving.served import Served
from chatglm.serving.settings import ServeSettings

from .processes import free_port
from .tiny_weights import build, settings, write_weights

QUESTION = "三上下丌不与"  # the tiny vocabulary has these


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_weights(tmp_path_factory.mktemp("api"), std=0.36))


@pytest.fixture(scope="module")
def plain(folder):
    return load_for_inference(folder, precision="32", device="cpu")


@contextlib.contextmanager
def running(model, tokenizer, *, keys=(), runner=None, waits=True, **limits):
    """(served, address) of a server in a thread of this process."""
    served = Served(model, tokenizer, ServeSettings(kv_cache_tokens=4096, **limits))
    if runner is not None:
        served.engine.runner = runner
    port = free_port()
    app = build_app(served, keys)
    config = uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{port}"
    wait_until(lambda: is_ready(address) if waits else server.started)
    try:
        yield served, address
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def is_ready(address):
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{address}/ready").status_code == 200
    return False


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server(plain):
    with running(*plain) as (served, address):
        yield served, address


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server[1], timeout=30) as client:
        yield client


@pytest.fixture
def openai_client(server):
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0) as client:
        yield client


def asked(text=QUESTION, **more):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **more}


def test_the_released_call_answers_as_chat_does(plain, client):
    model, tokenizer = plain
    text, history = model.chat(tokenizer, QUESTION, do_sample=False, max_length=40)
    body = {"prompt": QUESTION, "history": [], "max_length": 40, "temperature": 0}
    answer = client.post("/", json=body).json()
    assert answer["response"] == text and answer["history"] == [list(history[0])]
    assert answer["status"] == 200
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", answer["time"])
    again = {**body, "prompt": "不与", "history": answer["history"], "max_length": 90}
    text, _ = model.chat(tokenizer, "不与", history, do_sample=False, max_length=90)
    assert client.post("/", json=again).json()["response"] == text


def test_the_released_call_takes_the_defaults_and_says_what_it_dropped(client):
    assert client.post("/", json={"prompt": "下下"}).json()["status"] == 200
    long = [["三" * 30, "与" * 30]] * 4
    answer = client.post("/", json={"prompt": "下下", "history": long}).json()
    assert 0 < answer["dropped_rounds"] <= 4 and len(answer["history"]) == 5


def test_an_openai_client_gets_the_answer_whole_and_in_pieces(plain, openai_client):
    model, tokenizer = plain
    text, _ = model.chat(tokenizer, QUESTION, do_sample=False, max_length=128, max_new_tokens=8)
    whole = openai_client.chat.completions.create(model="chatglm-6b", temperature=0, **asked())
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 8
    assert whole.usage.prompt_tokens == len(tokenizer.encode_prompt(QUESTION))
    pieces = list(openai_client.chat.completions.create(
        model="chatglm-6b", temperature=0, stream=True, stream_options={"include_usage": True},
        **asked(),
    ))  # fmt: skip
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == text
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == "length"
    assert pieces[-1].usage == whole.usage


def test_rounds_and_system_messages_stand_in_the_template(plain, openai_client):
    model, tokenizer = plain
    messages = [
        {"role": "system", "content": "万"},
        {"role": "user", "content": [{"type": "text", "text": "丈"}]},
        {"role": "assistant", "content": "丗"},
        {"role": "user", "content": "世"},
    ]
    rounds = [("万\n丈", "丗")]
    text, _ = model.chat(tokenizer, "世", rounds, do_sample=False, max_length=128, max_new_tokens=6)
    answer = openai_client.chat.completions.create(
        model="chatglm-6b", messages=messages, max_completion_tokens=6, temperature=0
    )
    assert answer.choices[0].message.content == text


def test_a_seed_repeats_an_answer_and_choices_differ(openai_client):
    def answers(seed):
        made = openai_client.chat.completions.create(
            model="chatglm-6b", seed=seed, n=3, temperature=1.9, top_p=1.0, **asked()
        )
        return [choice.message.content for choice in made.choices]

    first = answers(7)
    assert answers(7) == first and answers(8) != first and len(set(first)) == 3


def test_a_stop_string_ends_the_answer(plain, openai_client):
    whole = openai_client.chat.completions.create(
        model="chatglm-6b", temperature=0, **asked(max_tokens=30)
    )
    text = whole.choices[0].message.content
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    cut = openai_client.chat.completions.create(
        model="chatglm-6b", temperature=0, stop=["\0never", stop], **asked(max_tokens=30)
    )
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < whole.usage.completion_tokens


def test_completions_take_texts_and_token_ids_without_a_template(plain, openai_client):
    tokenizer = plain[1]
    ids = tokenizer.encode_texts([QUESTION])[0]
    made = [
        openai_client.completions.create(
            model="chatglm-6b", prompt=prompt, max_tokens=6, temperature=0
        )
        for prompt in (QUESTION, ids, [QUESTION, "下下"], [ids])
    ]
    texts = [[choice.text for choice in one.choices] for one in made]
    assert texts[0] == texts[1] == texts[3] == texts[2][:1]
    assert len(texts[2]) == 2 and made[2].usage.completion_tokens == 12
    streamed = openai_client.completions.create(
        model="chatglm-6b", prompt=[QUESTION, "下下"], max_tokens=6, temperature=0, stream=True
    )
    grown = ["", ""]
    for piece in streamed:
        grown[piece.choices[0].index] += piece.choices[0].text
    assert grown == texts[2]


def test_langchain_talks_to_it(server):
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(
        base_url=f"{server[1]}/v1", api_key="none", model="chatglm-6b", temperature=0, max_tokens=5
    )
    whole = chat.invoke([("system", "万"), ("human", QUESTION)])
    pieces = list(chat.stream([("system", "万"), ("human", QUESTION)]))
    assert whole.content and "".join(piece.content for piece in pieces) == whole.content


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{}]}, "tools"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 99}, "n"),
        ({"top_k": 0}, "top_k"),
        ({"stop": "x" * 257}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1000}, "max_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"temprature": 1}, "temprature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "三" * 500}]}, "messages"),
    ],
)  # fmt: skip
def test_what_can_not_be_honoured_is_refused_by_its_field(client, change, param):
    body = asked(**change)
    if change.get("messages"):
        del body["max_tokens"]
    answer = client.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"].startswith(param), error
    assert param.split(".")[0] in error["message"] or "prompt" in error["message"]


def test_neutral_values_are_taken(client):
    neutral = {
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "logprobs": False,
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "user": "me",
        "n": None, "stop": None, "seed": -5, "store": False, "metadata": {"a": "b"},
        "top_k": 3, "repetition_penalty": 1.1,
    }  # fmt: skip
    assert client.post("/v1/chat/completions", json=asked(**neutral)).status_code == 200


def test_an_answer_that_is_sent_back_as_it_came_is_taken(openai_client):
    first = openai_client.chat.completions.create(model="chatglm-6b", **asked(temperature=0))
    rounds = [{"role": "user", "content": QUESTION}, first.choices[0].message.model_dump()]
    again = openai_client.chat.completions.create(
        model="chatglm-6b", messages=[*rounds, {"role": "user", "content": "不与"}], max_tokens=3
    )
    assert again.choices[0].finish_reason


def test_what_is_no_json_names_no_field(client):
    answer = client.post("/", content=b'{"a":', headers={"Content-Type": "application/json"})
    assert answer.json()["error"]["param"] is None
    assert "not JSON (at character 5)" in answer.json()["error"]["message"]


def test_a_long_history_is_dropped_quickly(plain, client):
    history = [["三", "与"]] * 1000
    started = time.monotonic()
    answer = client.post("/", json={"prompt": QUESTION, "history": history}).json()
    assert answer["dropped_rounds"] > 900 and time.monotonic() - started < 5
    tokenizer, most = plain[1], answer["dropped_rounds"]
    for dropped, fits in ((most, True), (most - 1, False)):
        ids = tokenizer.encode_prompt(build_prompt(QUESTION, history[dropped:]))
        assert (len(ids) + 128 // 8 <= 128) is fits


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/v1/chat/completions", b"not json", 400),
        ("/v1/chat/completions", b"[]", 400),
        ("/v1/chat/completions", b"\xff\xfe", 400),
        ("/v1/chat/completions", json.dumps(asked("\ud800")).encode(), 400),
        ("/v1/completions", b'{"prompt": [5, 301]}', 400),
        ("/v1/completions", b'{"prompt": [99999999999999999999]}', 400),
        ("/v1/chat/completions", json.dumps(asked(model="gpt-5")).encode(), 404),
        ("/", b'{"prompt": "a", "max_length": 4000}', 400),
        ("/", b'{"prompt": "a", "history": [["a"]]}', 400),
        ("/nowhere", b"{}", 404),
        ("/v1/chat/completions", b"x" * (1 << 20 | 1), 413),
    ],
)
def test_bad_requests_are_told_in_openai_s_form(client, path, content, status):
    answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["message"] and error["type"] == "invalid_request_error"
    assert "Traceback" not in answer.text


def test_adapters_are_models_of_their_own(folder, tmp_path):
    folders = {}
    for method in ("lora", "rslora"):
        chosen = settings(folder, method)
        tuned = build(chosen)
        folders[method] = str(tmp_path / method)
        state = {name: tensor.detach() for name, tensor in tuned.state_dict().items()}
        save_trained(tuned, state, chosen, folders[method], tokenizer=None)
    model, tokenizer = load_for_inference(
        folders["lora"], precision="32", device="cpu", adapters={"poems": folders["rslora"]}
    )
    with running(model, tokenizer) as (_, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        names = [one.id for one in client.models.list().data]
        assert names == ["chatglm-6b", "poems", "base"]
        texts = [
            client.chat.completions.create(model=name, temperature=0, **asked())
            .choices[0].message.content
            for name in names
        ]  # fmt: skip
        assert len(set(texts)) == 3
        with pytest.raises(openai.NotFoundError, match=r"Did you mean 'poems'"):
            client.chat.completions.create(model="poem", **asked())


def test_an_adapter_that_replaces_modules_is_served_alone(folder, tmp_path):
    chosen = settings(folder, "saved modules")
    tuned = build(chosen)
    state = {name: tensor.detach() for name, tensor in tuned.state_dict().items()}
    save_trained(tuned, state, chosen, str(tmp_path / "saved"), tokenizer=None)
    model, tokenizer = load_for_inference(str(tmp_path / "saved"), precision="32", device="cpu")
    text, _ = model.chat(tokenizer, QUESTION, do_sample=False, max_length=128, max_new_tokens=8)
    with running(model, tokenizer) as (served, address):
        assert list(served.adapters) == ["chatglm-6b"]
        body = asked(temperature=0)
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=30).json()
        assert answer["choices"][0]["message"]["content"] == text


class Slow(PlainRunner):
    """A runner with a pause before each step."""

    def __init__(self, model, seconds):
        super().__init__(model, num_pages=64)
        self.seconds = seconds

    def step(self, rows):
        time.sleep(self.seconds)
        super().step(rows)


@contextlib.contextmanager
def slowly(plain, seconds=0.02, **limits):
    with (
        running(*plain, runner=Slow(plain[0], seconds), **limits) as (served, address),
        httpx.Client(base_url=address, timeout=30) as client,
    ):
        yield served, client


def load_of(served):
    scheduler = served.engine.scheduler
    return len(scheduler.running) + len(scheduler.waiting), scheduler.pool.num_free


def test_a_client_that_goes_away_frees_its_pages(plain):
    with slowly(plain, deadline_seconds=60) as (served, client):
        whole = asked(max_tokens=80, temperature=0)
        with client.stream("POST", "/v1/chat/completions", json={**whole, "stream": True}) as s:
            lines = s.iter_lines()
            next(lines)
            wait_until(lambda: load_of(served)[0] == 1)
        wait_until(lambda: load_of(served) == (0, 64))
        seed_call = {"prompt": QUESTION, "temperature": 0}  # ends by its length alone
        for path, body in (("/v1/chat/completions", whole), ("/", seed_call)):
            with pytest.raises(httpx.ReadTimeout):
                client.post(path, json=body, timeout=0.1)
            wait_until(lambda: load_of(served) == (0, 64))


def test_a_full_server_says_when_to_come_back(plain):
    with slowly(plain, 0.2, max_running=1, max_waiting=1) as (served, client):
        done = []

        def ask():
            done.append(httpx.post(client.base_url.join("/v1/chat/completions"),
                                   json=asked(temperature=0), timeout=60))  # fmt: skip

        threads = [threading.Thread(target=ask) for _ in range(2)]
        threads[0].start()
        wait_until(lambda: load_of(served)[0] == 1 and served.engine._num_waiting == 0)
        threads[1].start()
        wait_until(lambda: served.engine._num_waiting == 1)
        answer = client.post("/v1/chat/completions", json=asked())
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert "try again" in answer.json()["error"]["message"]
        for thread in threads:
            thread.join()
        assert [one.status_code for one in done] == [200, 200]


def test_a_client_has_its_limit(plain):
    with slowly(plain, 0.2, max_requests_per_client=1) as (served, client):
        body = asked(temperature=0, stream=True)
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()  # closes the stream when it is forgotten
            next(lines)
            answer = client.post("/v1/chat/completions", json=asked())
            assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        wait_until(lambda: load_of(served)[0] == 0)
        assert client.post("/v1/chat/completions", json=asked()).status_code == 200


def test_no_request_asks_for_more_than_a_client_may_have(plain):
    with running(*plain, max_requests_per_client=4) as (_, address):
        body = {"prompt": [QUESTION] * 3, "n": 2, "max_tokens": 2}
        answer = httpx.post(f"{address}/v1/completions", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "n"


def test_the_warming_up_is_in_no_metric_and_so_is_a_prompt_that_was_never_read(plain):
    with slowly(plain, 0.2, max_running=1) as (served, client):
        assert metric(client, "chatglm_generated_tokens_total") == 0
        body = asked(temperature=0)
        with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as one:
            lines = one.iter_lines()
            next(lines)
            wait_until(lambda: load_of(served)[0] == 1)
            with pytest.raises(httpx.ReadTimeout):  # it waits, and is left
                client.post("/v1/chat/completions", json=body, timeout=0.1)
        wait_until(lambda: load_of(served) == (0, 64))
        prompt = len(plain[1].encode_prompt(QUESTION))
        assert metric(client, "chatglm_prompt_tokens_total") == prompt


def test_a_deadline_is_told_before_the_answer_and_within_it(plain):
    with slowly(plain, deadline_seconds=0.15) as (served, client):
        answer = client.post("/v1/chat/completions", json=asked(max_tokens=80, temperature=0))
        assert answer.status_code == 504 and "deadline" in answer.json()["error"]["message"]
        body = asked(max_tokens=80, stream=True, temperature=0)
        lines = client.post("/v1/chat/completions", json=body).text.strip().split("\n\n")
        assert "deadline" in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]
        assert load_of(served) == (0, 64)


def test_a_reader_that_never_reads_holds_neither_pages_nor_the_server(plain):
    with slowly(plain, 0.0, deadline_seconds=1.0, grace_seconds=0.5) as (served, client):
        body = json.dumps(asked(max_tokens=100, n=16, stream=True, top_p=1.0)).encode()
        head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
                "Content-Type: application/json\r\n\r\n")  # fmt: skip
        with socket.socket() as sleeper:
            sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            sleeper.connect(("127.0.0.1", client.base_url.port))
            sleeper.sendall(head.encode() + body)
            wait_until(lambda: load_of(served)[0] > 0)
            wait_until(lambda: load_of(served) == (0, 64))
            assert client.post("/v1/chat/completions", json=asked()).status_code == 200


def test_keys_are_asked_for_and_never_logged(plain, caplog):
    with (
        running(*plain, keys=["first-key", "second-key"]) as (_, address),
        httpx.Client(base_url=address) as client,
    ):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic abc"},
                        {"Authorization": "Bearer " + "\u00e9"}):  # fmt: skip
            answer = client.post("/v1/chat/completions", json=asked(), headers={
                name: value.encode("latin-1") for name, value in headers.items()})  # fmt: skip
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert client.post("/", json={"prompt": "a"}).status_code == 401
        assert client.get("/v1/models").status_code == 401
        for key in ("first-key", "second-key"):
            allowed = {"Authorization": f"Bearer {key}"}
            answer = client.post("/v1/chat/completions", json=asked(), headers=allowed)
            assert answer.status_code == 200
        assert client.get("/").status_code == client.get("/health").status_code == 200
    assert "first-key" not in caplog.text


def test_keys_come_from_a_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# of the team\nalpha\n\nbeta # Bea's\ns#1\n")
    assert read_keys(str(file), {"CHATGLM_API_KEYS": "gamma, delta"}) == [
        "gamma", "delta", "alpha", "beta", "s#1",
    ]  # fmt: skip
    file.write_text("# none\n")
    with pytest.raises(ToolkitError, match="holds no key"):
        read_keys(str(file), {})
    with pytest.raises(ToolkitError, match="cannot be read"):
        read_keys(str(tmp_path / "nowhere"), {})
    with pytest.raises(ToolkitError, match="API key number 1"):
        read_keys(None, {"CHATGLM_API_KEYS": "schlüssel"})


def test_health_readiness_and_metrics(server, client):
    before = metric(client, "chatglm_generated_tokens_total")
    client.post("/v1/chat/completions", json=asked())
    wait_until(lambda: metric(client, "chatglm_requests_running") == 0)
    assert metric(client, "chatglm_generated_tokens_total") - before == 8
    assert metric(client, "chatglm_cache_pages_used") == 0
    assert metric(client, "chatglm_first_token_seconds_count") > 0
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"ready": True}


def metric(client, name):
    text = client.get("/metrics").text
    return float(re.search(rf"^{name} (\S+)$", text, flags=re.MULTILINE)[1])


def test_other_origins_are_refused_unless_they_are_named(plain, client):
    asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "authorization,x-stainless-lang"
    assert "access-control-allow-origin" not in client.options("/", headers=asks).headers
    with running(*plain, cors_origins=["https://a.example"]) as (_, address):
        answer = httpx.options(f"{address}/v1/chat/completions", headers=asks)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
        read = httpx.get(f"{address}/health", headers={"Origin": "https://a.example"})
        assert read.headers["access-control-expose-headers"] == "Retry-After"
        other = httpx.options(f"{address}/", headers={**asks, "Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_prompts_are_logged_only_if_that_is_asked_for(plain, caplog):
    caplog.set_level("INFO", logger="chatglm")
    for asks in (False, True):
        with running(*plain, log_prompts=asks) as (_, address):
            for stream in (False, True):
                body = asked("秘密", stream=stream)
                httpx.post(f"{address}/v1/chat/completions", json=body, timeout=30)
        assert caplog.text.count("秘密") == (2 if asks else 0)


class Broken(PlainRunner):
    """A runner that can do nothing."""

    def start(self, rows):
        raise ZeroDivisionError("broken")


def test_a_warming_up_that_fails_is_said(plain):
    broken = Broken(plain[0], num_pages=64)
    with running(*plain, runner=broken, waits=False) as (_, address):
        wait_until(lambda: "reason" in httpx.get(f"{address}/ready").json())
        answer = httpx.get(f"{address}/ready")
        assert answer.status_code == 503 and "broken" in answer.json()["reason"]


def test_limits_that_can_not_be_are_refused_before_anything_is_served(plain):
    for limits, words in (
        ({"max_total_tokens": 4096}, "reads at most 128"),
        ({"kv_cache_tokens": 64}, "one request may take 128"),
        ({"kv_cache_tokens": 10**12}, "GiB are free"),
    ):
        with pytest.raises(ToolkitError, match=words):
            Served(*plain, ServeSettings(**limits))
