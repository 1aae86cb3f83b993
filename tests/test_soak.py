"""Thousands of requests of every kind at once: memory and pages return to where they began.

SOAK_REQUESTS=10000 python -m pytest tests/test_soak.py
"""

import asyncio
import json
import os
import random
import re

import httpx
import psutil

from .processes import free_port
from .test_api import wait_until
from .test_infer_api import process
from .tiny_weights import write_weights

REQUESTS = int(os.environ.get("SOAK_REQUESTS", 400))
AT_ONCE = 40
GROWTH_BYTES = 24 << 20
"""Between a quarter of the requests and their end: what allocators keep, not what leaks."""
BAD = [b"{", b'{"messages": []}', b'{"messages": [{"role": "user", "content": 5}]}',
       json.dumps({"messages": [{"role": "user", "content": "x"}], "n": 999}).encode(),
       json.dumps({"prompt": [1, 2, 10**12]}).encode(), b"\xff" * 100]  # fmt: skip


async def one(client, port, chance, counts):
    """A request of a kind that chance chooses."""
    text = "".join(chance.choices("三上下丌不与世丘", k=chance.randrange(1, 60)))
    body = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": chance.randrange(1, 40),
        "temperature": chance.choice([0, 0.7, 1.5]),
        "n": chance.choice([1, 1, 1, 2]),
        "stream": chance.random() < 0.7,
    }
    kind = chance.choices(["whole", "leaving", "bad", "slow"], [70, 15, 10, 5])[0]
    counts[kind] = counts.get(kind, 0) + 1
    path = "/v1/chat/completions"
    if kind == "bad":
        answer = await client.post(path, content=chance.choice(BAD))
        assert answer.status_code == 400, answer.text
    elif kind == "slow":
        await read_slowly(port, {**body, "stream": True}, chance)
    elif kind == "leaving":
        asked = client.post(path, json=body)
        try:
            await asyncio.wait_for(asked, chance.random() * 0.3)
        except TimeoutError:
            counts["left"] = counts.get("left", 0) + 1
    else:
        answer = await client.post(path, json=body)
        if answer.status_code == 503:  # the queue is full, and says so
            counts["busy"] = counts.get("busy", 0) + 1
            return
        assert answer.status_code == 200, answer.text
        if body["stream"]:
            assert answer.text.endswith("data: [DONE]\n\n"), answer.text[-300:]


async def read_slowly(port, body, chance):
    """A few bytes now and then, then away."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
    for _ in range(chance.randrange(1, 6)):
        await reader.read(64)
        await asyncio.sleep(0.05)
    writer.close()


async def ask_everything(address, port, number, seed, counts):
    chance, gate = random.Random(seed), asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:

        async def gated():
            async with gate:
                await one(client, port, chance, counts)

        await asyncio.gather(*(gated() for _ in range(number)))


def metric(address, name):
    text = httpx.get(f"{address}/metrics").text
    return float(re.search(rf"^{name} (\S+)$", text, flags=re.MULTILINE)[1])


def test_memory_and_pages_return_to_where_they_began(tmp_path):
    folder = str(write_weights(tmp_path, std=0.36))
    port, counts = free_port(), {}
    with process(folder, port, tmp_path / "log", kv_cache_tokens=512, max_waiting=48) as (
        server,
        address,
    ):
        memory = psutil.Process(server.pid).memory_info
        asyncio.run(ask_everything(address, port, REQUESTS // 4, 1, counts))
        early = memory().rss
        asyncio.run(ask_everything(address, port, REQUESTS - REQUESTS // 4, 2, counts))
        for name in ("chatglm_cache_pages_used", "chatglm_requests_running",
                     "chatglm_requests_waiting"):  # fmt: skip
            wait_until(lambda name=name: metric(address, name) == 0)
        late = memory().rss
        assert httpx.get(f"{address}/health").status_code == 200
        back = metric(address, "chatglm_rows_put_back_total")
    log = (tmp_path / "log").read_text()
    early_mib, late_mib = early / 2**20, late / 2**20
    print(f"{REQUESTS} requests {counts}; rows put back {back:.0f}; memory {early_mib:.0f} MiB"
          f" after a quarter, {late_mib:.0f} MiB at the end")  # fmt: skip
    assert "Traceback" not in log, log[log.index("Traceback") :][:3000]
    assert late - early < GROWTH_BYTES
    assert counts["left"] and counts["bad"] and counts["slow"]
