"""The server under load, beside the bare decoding of the same model, and with adapters beside none.

    python benchmarks/serve.py                       # the true shape on a GPU, a tiny one on a CPU
    python benchmarks/serve.py --kind int4 --adapters 0
    python benchmarks/serve.py --url http://127.0.0.1:56780

The server runs in a process of its own: uvicorn, the application, random weights, and a tokenizer
of as many made-up pieces. Before it serves, the model decodes there without a server. This process
is the client: it sends token ids, reads the streams, and says how much of a core that took.
Requests come at random times, --rate a second on average; one that finds all clients busy goes out
as soon as one is free, and its times count from then. Tokens are those of the streams' `usage`.
"""

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import torch
import uvicorn
from sentencepiece import sentencepiece_model_pb2

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from benchmarks.random_model import random_model  # noqa: E402
from chatglm.configuration import ChatGLMConfig  # noqa: E402
from chatglm.decoding import generate_tokens  # noqa: E402
from chatglm.growing_text import GrowingText  # noqa: E402
from chatglm.sampling import Sampling  # noqa: E402
from chatglm.serving.api import build_app  # noqa: E402
from chatglm.serving.served import Served  # noqa: E402
from chatglm.serving.settings import ServeSettings  # noqa: E402
from chatglm.settings import LoraSettings  # noqa: E402
from chatglm.steps import forget_steps  # noqa: E402
from chatglm.tokenizer import ChatGLMTokenizer  # noqa: E402
from chatglm.tuning.adapters import add_lora  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {"fp16": 0, "bf16": 0, "int8": 8, "int4": 4}
TINY = {"vocab_size": 2432, "hidden_size": 128, "inner_hidden_size": 512, "num_layers": 4,
        "num_attention_heads": 4, "bos_token_id": 2404, "eos_token_id": 2405,
        "mask_token_id": 2400, "gmask_token_id": 2401}  # fmt: skip
LOAD = {"cuda": {"requests": 256, "prompt_tokens": 512, "new_tokens": 128},
        "cpu": {"requests": 96, "prompt_tokens": 64, "new_tokens": 32}}  # fmt: skip
GOALS = {"tok/s": "3,000", "first token, s": "p95 < 1", "of bare": "95 %", "of none": "80 %"}
"""On one H100, for fp16 in the true shape and the load as it is if nothing else is asked for."""
ALONE = 6
"""Answers to one client alone, and of the bare model; the first does not count."""
SAMPLED = {"greedy": {"temperature": 0}, "sampled": {}}
READY_SECONDS = 900


# ---- the server's process ----


def build(kind: str):
    """(model, tokenizer) of random weights; head and embedding are one tensor."""
    bits = KINDS[kind]
    shape = {} if DEVICE == "cuda" else TINY
    config = ChatGLMConfig(quantization_bit=bits, **shape)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    on_device = dtype if DEVICE == "cuda" else torch.float32
    model = random_model(config, dtype=on_device, device=DEVICE)
    tokenizer = tokenizer_of(config)
    model.transformer.word_embeddings.weight[tokenizer.all_special_ids] = 0  # they have no text
    return model, tokenizer


def tokenizer_of(config):
    """One whose every id is a piece of one or two characters, so that every token shows."""
    control = {1: "<s>", 2: "</s>", 3: "<pad>", config.mask_token_id: "[MASK]",
               config.gmask_token_id: "[gMASK]", config.bos_token_id: "<sop>",
               config.eos_token_id: "<eop>"}  # fmt: skip
    vocabulary = sentencepiece_model_pb2.ModelProto()
    kinds = vocabulary.SentencePiece
    for number in range(config.vocab_size):
        high, low = divmod(number, 20_000)
        text = chr(0x4E00 + low) + (chr(0x4E00 + high) if high else "")
        text, kind = control.get(number, text), kinds.NORMAL
        if number == 0:
            text, kind = "<unk>", kinds.UNKNOWN
        elif number in control:
            kind = kinds.CONTROL
        vocabulary.pieces.add(piece=text, score=0.0, type=kind)
    vocabulary.normalizer_spec.add_dummy_prefix = False
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ice_text.model")
        with open(path, "wb") as file:
            file.write(vocabulary.SerializeToString())
        return ChatGLMTokenizer(path)


def with_adapters(model, number: int):
    """The model with so many LoRA adapters of random weights, as data_utils.py would train them."""
    tuned = add_lora(model, LoraSettings(lora_dropout=0.0))
    for other in range(2, number + 1):
        tuned.add_adapter(f"adapter{other}", tuned.peft_config["default"])
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.02)
    return tuned.eval()


def bare_rate(model, tokenizer, given) -> float:
    """Tokens/s of one answer after its first token, without a server, as its text grows."""
    config, rates = model.config, []
    for number in range(ALONE):
        ids = prompt(number, given, model.config.vocab_size)
        ids = torch.tensor([[*ids, config.gmask_token_id, config.bos_token_id]])
        answer, times = GrowingText(tokenizer.decode), []
        for tokens in generate_tokens(
            model,
            ids.to(model.device),
            max_new_tokens=given.new_tokens,
            sampling=Sampling(do_sample=given.sampling == "sampled"),
            eos_token_ids=[-1],
        ):
            answer.add(int(tokens[0]))
            times.append(time.perf_counter())
        rates.append((len(times) - 1) / (times[-1] - times[0]))
    return statistics.median(rates[1:])


def serve(given) -> None:
    """Decode without a server, say how fast, then serve until the other side of stdin is gone."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    with torch.no_grad():
        model, tokenizer = build(given.kind)
    said = {"where": f"{os.cpu_count()} cores", "vocabulary": model.config.vocab_size}
    if DEVICE == "cuda":
        said["where"] = torch.cuda.get_device_name()
    else:
        torch.set_num_threads(1)  # tiny tensors: threads cost more than they give
    if not given.adapters:
        said["bare"] = bare_rate(model, tokenizer, given)
        forget_steps()
    model.config.eos_token_id = -1  # answers have their full length
    tuned = with_adapters(model, given.adapters) if given.adapters else model
    settings = ServeSettings(
        max_running=given.max_running,
        max_requests_per_client=2 * given.clients,
        max_waiting=2 * given.clients,
    )
    app = build_app(Served(tuned, tokenizer, settings))
    print(json.dumps(said), flush=True)
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_level="warning")


@contextlib.contextmanager
def a_server(given, adapters: int) -> Iterator[tuple[str, dict]]:
    """(address, what it said) of a server that is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--side", "server", "--port", str(port),
               "--adapters", str(adapters)]  # fmt: skip
    for name in ("kind", "clients", "prompt_tokens", "new_tokens", "sampling", "max_running"):
        command += [f"--{name}", str(getattr(given, name))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        told = next((line for line in process.stdout if line.startswith("{")), None)
        if told is None:
            raise SystemExit(f"the server ended with code {process.wait()}")
        address = f"http://127.0.0.1:{port}"
        wait_until_ready(address, process)
        yield address, json.loads(told)
    finally:
        process.stdin.close()
        process.wait(60)


def wait_until_ready(address: str, process: subprocess.Popen) -> None:
    """Returns once /ready says so."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with code {process.returncode}")
        with contextlib.suppress(OSError):
            if fetch(address, "/ready", None)[0] == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"{address} is not ready after {READY_SECONDS} s")


# ---- the client's ----


@dataclass
class Answer:
    """When a request went out, when the events of its stream came, and how many tokens it had."""

    sent: float
    events: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.events[0] - self.sent

    @property
    def each(self) -> float:
        """Seconds of a token after the first."""
        return (self.events[-1] - self.events[0]) / max(self.tokens - 1, 1)

    @property
    def pause(self) -> float:
        """The longest time between two events, seconds."""
        return max((b - a for a, b in itertools.pairwise(self.events)), default=0.0)

    def tokens_within(self, start: float, end: float) -> float:
        """As if each of its events had as many tokens."""
        inside = sum(start <= moment <= end for moment in self.events)
        return self.tokens * inside / len(self.events)


def prompt(number: int, given, vocabulary: int) -> list[int]:
    """Ids of the request of this number: an eighth more or less than prompt_tokens."""
    chance = random.Random(number)
    low, high = given.token_ids or (400, min(vocabulary, 100_000) - 100)
    spread = given.prompt_tokens // 8
    length = given.prompt_tokens + chance.randint(-spread, spread)
    return [chance.randrange(low, high) for _ in range(length)]


def fetch(address: str, path: str, api_key: str | None) -> tuple[int, bytes]:
    """Status and body of a GET."""
    where = urlsplit(address)
    connection = http.client.HTTPConnection(where.hostname, where.port or 80, timeout=10)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


class Client:
    """Requests to one server."""

    def __init__(self, address: str, given, vocabulary: int):
        self.where, self.given, self.vocabulary = urlsplit(address), given, vocabulary

    def request(self, number: int, model: str | None) -> bytes:
        """The bytes of a request over HTTP."""
        given = self.given
        body = {"prompt": prompt(number, given, self.vocabulary), "max_tokens": given.new_tokens,
                "seed": number, "stream": True, "stream_options": {"include_usage": True},
                **SAMPLED[given.sampling]}  # fmt: skip
        if model is not None:
            body["model"] = model
        content = json.dumps(body).encode()
        key = f"Authorization: Bearer {given.api_key}\r\n" if given.api_key else ""
        return (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self.where.netloc}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n{key}\r\n"
        ).encode() + content

    async def ask(self, number: int, model: str | None) -> Answer:
        """One answer. Its events are told from each other, and only the last is parsed."""
        content = self.request(number, model)
        reader, writer = await asyncio.open_connection(self.where.hostname, self.where.port or 80)
        try:
            answer, last = Answer(time.perf_counter()), b""
            writer.write(content)
            status = await reader.readline()
            if status.split(b" ")[1] != b"200":
                raise SystemExit(f"{status!r}: {(await reader.read())[-500:]!r}")
            async for line in reader:
                if line.startswith(b"data: {"):
                    answer.events.append(time.perf_counter())
                    last = line
            usage = json.loads(last.removeprefix(b"data: ")).get("usage")
            if usage is None:
                raise SystemExit(f"an answer ended with {last!r}")
            answer.events.pop()  # of the usage
            answer.tokens = usage["completion_tokens"]
            return answer
        finally:
            writer.close()

    async def load(
        self, models: Sequence[str | None], requests: int, first: int = ALONE
    ) -> list[Answer]:
        """So many requests, to each of the models in turn, from as many clients as there may be."""
        given, chance = self.given, random.Random(0)
        gaps = [chance.expovariate(given.rate) for _ in range(requests)]
        arrivals = enumerate(itertools.accumulate(gaps))
        start, answers = time.perf_counter(), []

        async def client() -> None:
            for number, moment in arrivals:  # shared: whoever is free takes the next
                await asyncio.sleep(max(start + moment - time.perf_counter(), 0))
                answers.append(await self.ask(first + number, models[number % len(models)]))

        async with asyncio.TaskGroup() as group:
            for _ in range(given.clients):
                group.create_task(client())
        return answers

    async def alone(self) -> list[Answer]:
        """One request after the other; the first does not count."""
        return [await self.ask(number, None) for number in range(ALONE)][1:]


@dataclass
class Summary:
    """Of the answers under load, and of what the client itself took."""

    answers: list[Answer]
    core: float
    clients: int

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def rate(self) -> float:
        """Tokens/s from the first request to the last event."""
        first = min(answer.sent for answer in self.answers)
        return self.tokens / (max(answer.events[-1] for answer in self.answers) - first)

    @property
    def busy_rate(self) -> float:
        """Tokens/s while there was work for every client: the beginning and the end aside."""
        sent = sorted(answer.sent for answer in self.answers)
        start, end = sent[min(self.clients, len(sent)) - 1], sent[-1]
        if end <= start:
            return float("nan")
        within = sum(answer.tokens_within(start, end) for answer in self.answers)
        return within / (end - start)


def under_load(client: Client, models: Sequence[str | None]) -> Summary:
    """Two requests a client that do not count, for what is made at first use; then all."""
    given = client.given
    asyncio.run(client.load(models, 2 * given.clients, first=1_000_000))
    wall, cpu = time.perf_counter(), time.process_time()
    answers = asyncio.run(client.load(models, given.requests))
    core = (time.process_time() - cpu) / (time.perf_counter() - wall)
    return Summary(answers, core, given.clients)


# ---- the table ----


def show(what: str, value: str, goal: str = "") -> None:
    """A row."""
    print(f"| {what} | {value} | {goal} |", flush=True)


def two(values: Sequence[float], factor: float = 1.0, digits: int = 2) -> str:
    """The middle one, and that which one in twenty exceeds."""
    ordered = sorted(factor * value for value in values)
    high = ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)]
    return f"{statistics.median(ordered):,.{digits}f} / {high:,.{digits}f}"


def show_load(summary: Summary, given, goals: dict) -> None:
    """The rows of one scenario."""
    answers = summary.answers
    show(f"{given.clients} clients: generated, tok/s", f"{summary.rate:,.0f}", goals["tok/s"])
    show("... while all clients have work, tok/s", f"{summary.busy_rate:,.0f}")
    show("... first token, p50 / p95, s", two([answer.first for answer in answers]),
         goals["first token, s"])  # fmt: skip
    show("... a token after the first, p50 / p95, ms", two([one.each for one in answers], 1e3))
    show("... longest pause in an answer, p50 / p95, ms", two([one.pause for one in answers], 1e3))
    asked = len(answers) * given.new_tokens
    events = sum(len(one.events) for one in answers)
    show("... tokens generated, of those asked for; events", f"{summary.tokens:,} of {asked:,};"
         f" {events:,}")  # fmt: skip
    show("... of a core, this client", f"{100 * summary.core:.0f} %")


def measure(client: Client, said: dict, given, goals: dict) -> Summary:
    """One client alone, then all of them."""
    rates = [1 / answer.each for answer in asyncio.run(client.alone())]
    alone = statistics.median(rates)
    if "bare" in said:
        show("bare decoding, one answer, tok/s", f"{said['bare']:,.1f}")
    show("one client, tok/s", f"{alone:,.1f}")
    if "bare" in said:
        show("... of bare", f"{100 * alone / said['bare']:.1f} %", goals["of bare"])
    summary = under_load(client, [None])
    show_load(summary, given, goals)
    return summary


def show_adapters(client: Client, names: list[str], none: float, goals: dict) -> None:
    """All clients again, their requests for each of the adapters in turn."""
    mixed = under_load(client, names)
    what = f"{mixed.clients} clients, {len(names)} adapters mixed: generated, tok/s"
    show(what, f"{mixed.rate:,.0f}")
    show("... of none", f"{100 * mixed.rate / none:.0f} %", goals["of none"])
    show("... first token, p50 / p95, s", two([answer.first for answer in mixed.answers]))


def names_of_adapters(address: str, api_key: str | None) -> list[str]:
    """The models that a server serves, the bare weights aside."""
    models = json.loads(fetch(address, "/v1/models", api_key)[1])["data"]
    return [model["id"] for model in models if model["id"] != "base"]


def measure_own(given) -> None:
    """Servers of our own: one without adapters, then one with them."""
    with a_server(given, 0) as (address, said):
        shape = "the true shape" if DEVICE == "cuda" else "a tiny shape (fp16, bf16: in fp32)"
        goals = GOALS if DEVICE == "cuda" and given.kind == "fp16" else dict.fromkeys(GOALS, "")
        head(f"{said['where']}, torch {torch.__version__}, {given.kind}, {shape}", given)
        none = measure(Client(address, given, said["vocabulary"]), said, given, goals)
    if given.adapters:
        with a_server(given, given.adapters) as (address, said):
            client = Client(address, given, said["vocabulary"])
            show_adapters(client, names_of_adapters(address, None), none.rate, goals)


def measure_other(given) -> None:
    """A server that runs already; the other side of its adapters are its bare weights."""
    client, goals = Client(given.url, given, 2000), dict.fromkeys(GOALS, "")
    head(given.url, given)
    measure(client, {}, given, goals)
    names = names_of_adapters(given.url, given.api_key)
    if len(names) > 1:
        show_adapters(client, names, under_load(client, ["base"]).rate, goals)


def head(where: str, given) -> None:
    """What is measured, and the table's head."""
    print(where)
    print(f"{given.requests} requests of {given.prompt_tokens} tokens, give or take an eighth,"
          f" {given.rate:g} a second, answers of {given.new_tokens}, {given.sampling}")  # fmt: skip
    print("| what | here | goal |\n|---|---|---|", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, default="fp16")
    parser.add_argument("--clients", type=int, default=32)
    for name, number in LOAD[DEVICE].items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--rate", type=float, default=40.0, help="requests a second")
    parser.add_argument("--sampling", choices=SAMPLED, default="sampled")
    parser.add_argument("--max_running", type=int, default=32, help="the server's setting")
    parser.add_argument("--adapters", type=int, default=8, help="0: none are measured")
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("--api_key")
    parser.add_argument("--token_ids", type=int, nargs=2, help="prompts are drawn from these")
    parser.add_argument("--side", choices=["server"])  # the child's
    parser.add_argument("--port", type=int)
    given = parser.parse_args()
    if given.side:
        serve(given)
    elif given.url:
        measure_other(given)
    else:
        measure_own(given)


if __name__ == "__main__":
    main()
