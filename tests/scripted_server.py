"""A server that serves the chat page and answers from a script, for the tests of the page.

The last user message chooses the answer: a key of SCRIPT, else DEFAULT. A record keeps what was
asked and whether a client left. Run as a module, it shows the page on port 8000.
"""

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from chatglm.serving.chat_page import add_page

KEY = "right"

ROUTE_ANSWER = """\
可以坐**高铁**，大约一个半小时。

1. 在南京南站上车
   - 提前半小时到站
   - 带好身份证
2. 在上海虹桥站下车

```python
def minutes(hours):
    return hours * 60  # "<b>" 也只是文字
```

> 周末票紧张，早点买。

| 车次 | 时间 |
|:---|---:|
| G7001 | 1 h 39 |

更多见 [12306](https://www.12306.cn) 。"""

HOSTILE_ANSWER = """\
<script>window.hacked=1</script>
<img src=x onerror="window.hacked=1">

[点我](javascript:window.hacked=1) **<b onmouseover="window.hacked=1">粗</b>**"""

ROUTE = "从南京到上海的路线"
HOSTILE = "攻击"
ENDLESS = "一直说"
CUT_BY_LENGTH = "数到一万"
BUSY = "忙吗"
BREAKS = "断开"
NEEDS_KEY = "密钥"
SCRIPT = {ROUTE: ROUTE_ANSWER, HOSTILE: HOSTILE_ANSWER, ENDLESS: "再说一句。"}
DEFAULT = "好的，一句话就够了。"


@dataclass
class Record:
    """What the server saw, and how often it is busy."""

    asked: list[dict] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    clients_left: int = 0
    busy_times: int = 0


@dataclass
class ScriptedServer:
    """Where it is, and the record of the requests from now on; a test puts its own there."""

    address: str = ""
    record: Record = field(default_factory=Record)


def build_app(scripted, piece_seconds):
    app = FastAPI()

    add_page(app)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [{"id": "chatglm-6b"}, {"id": "adgen-lora"}]}

    @app.post("/v1/chat/completions")
    async def complete(request: Request):
        body, record = await request.json(), scripted.record
        record.asked.append(body)
        record.keys.append(request.headers.get("Authorization"))
        question = body["messages"][-1]["content"]
        if question == NEEDS_KEY and record.keys[-1] != f"Bearer {KEY}":
            return refusal(401, "an API key is needed")
        if question == BUSY and record.busy_times:
            record.busy_times -= 1
            return refusal(503, "the queue is full", {"Retry-After": "1"})
        return StreamingResponse(
            stream(question, record, piece_seconds), media_type="text/event-stream"
        )

    return app


def refusal(status, message, headers=None):
    error = {"message": message, "type": "error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


async def stream(question, record, piece_seconds):
    """Server-sent events, each in two parts: cut inside its first Chinese character."""
    is_over = False
    try:
        for event in events(question):
            data = event.encode()
            cut = 1 + next((at for at, byte in enumerate(data) if byte > 127), 0)
            yield data[:cut]
            await asyncio.sleep(piece_seconds)
            yield data[cut:]
            await asyncio.sleep(0.05 if question == ENDLESS else piece_seconds)
        is_over = True
    finally:
        record.clients_left += not is_over


def events(question):
    yield ": keep-alive\n\n"
    answer = SCRIPT.get(question, DEFAULT)
    pieces = [answer[start : start + 6] for start in range(0, len(answer), 6)]
    while question == ENDLESS:
        yield chunk(answer)
    for piece in pieces:
        yield chunk(piece)
        if question == BREAKS:
            yield 'data: {"error": {"message": "the engine stopped"}}\n\n'
            return
    yield chunk(None, "length" if question == CUT_BY_LENGTH else "stop")
    usage = {"prompt_tokens": 9, "completion_tokens": len(pieces), "total_tokens": 9 + len(pieces)}
    yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


def chunk(content, finish_reason=None):
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n"


@contextmanager
def run_scripted_server(*, port=0, piece_seconds=0.002):
    """A ScriptedServer in a thread."""
    scripted = ScriptedServer()
    app = build_app(scripted, piece_seconds)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the scripted server did not start"
        time.sleep(0.01)
    bound = server.servers[0].sockets[0].getsockname()[1]
    scripted.address = f"http://127.0.0.1:{bound}/"
    try:
        yield scripted
    finally:
        server.force_exit = server.should_exit = True
        thread.join()


if __name__ == "__main__":
    with run_scripted_server(port=8000, piece_seconds=0.03) as running:
        print(running.address)
        threading.Event().wait()
