"""The HTTP application: the released call, OpenAI's, a chat page, health and metrics."""

import asyncio
import contextlib
import hmac
import logging
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Security
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ..prompts import build_prompt
from ..sampling import Sampling
from .bodies import LimitBodies
from .chat_page import add_page
from .engine import EngineBusy, EngineStopped
from .messages import (
    BadRequest,
    ChatRequest,
    CompletionRequest,
    SeedRequest,
    Shape,
    error_body,
    sampling_of,
    usage_of,
)
from .refusals import TooMany, add_refusals
from .request import Request as AnswerRequest
from .served import Served
from .streams import Answers, EventStream, Failed, while_client_is_there

logger = logging.getLogger("chatglm")

WARM_UP_TOKENS = 4
SWITCH_SECONDS = 1e-4
"""For which Python lets a thread run on, else fifty times as long: the engine's would wait so."""
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request can't be served; the field is named."},
    401: {"description": "An API key is needed."},
    404: {"description": "No such model."},
    408: {"description": "The request did not come whole in time."},
    413: {"description": "The request is too large."},
    429: {"description": "This client has too many requests running."},
    503: {"description": "Too many requests wait, or the server is stopping; see Retry-After."},
    504: {"description": "The deadline of the request has passed."},
}


class Api:
    """The calls, over what is served. keys: who has none of them is refused, if there are any."""

    def __init__(self, served: Served, keys: Sequence[str] = ()):
        self.served, self.settings = served, served.settings
        self.is_ready = False
        self.failure: str | None = None
        """Why it will not be ready."""
        self._keys = [key.encode() for key in keys]
        self._running: Counter[str] = Counter()  # requests of each client

    def client(self, request: Request, key: str | None) -> str:
        """Who asks: a number of a key, or an address."""
        if not self._keys:
            return request.client.host if request.client else ""
        given = (key or "").encode(errors="replace")
        known = [hmac.compare_digest(given, one) for one in self._keys]  # all, in constant time
        if not any(known):
            raise HTTPException(401, "this server asks for an API key: Authorization: Bearer KEY")
        return f"key {known.index(True)}"

    def submit(self, client: str, requests: Sequence[Any]) -> "_Counted":
        """Hand requests in for a client."""
        most = self.settings.max_requests_per_client
        if len(requests) > most:
            raise BadRequest(
                f"{len(requests)} answers are asked for at once; allowed are {most}", param="n"
            )
        if self._running[client] + len(requests) > most:
            raise TooMany(f"this client has {self._running[client]} requests running, of {most}")
        return _Counted(self.served, requests, self._running, client)

    async def warm_up(self) -> None:
        """Answer something, so that whatever is made at first use is made."""
        prompt, started = self.served.encode("你好"), time.monotonic()
        request = AnswerRequest(prompt, WARM_UP_TOKENS, Sampling(), is_counted=False)
        try:
            await Answers(self.served.engine, [request]).whole()
        except (Failed, EngineStopped, EngineBusy) as error:
            self.failure = f"the warming up failed: {error}"
            logger.error(self.failure)
            return
        self.is_ready = True
        logger.info("ready after %.1f s of warming up", time.monotonic() - started)


class _Counted(Answers):
    """Answers that count against their client while they run."""

    def __init__(self, served: Served, requests: Sequence[Any], running: Counter, client: str):
        super().__init__(served.engine, requests)
        self._running, self._client, self._count = running, client, len(requests)
        running[client] += self._count

    def close(self) -> None:
        """They have ended, or nobody wants them any more."""
        self.cancel()
        self._running[self._client] -= self._count
        self._count = 0
        if not self._running[self._client]:
            del self._running[self._client]


def build_app(served: Served, keys: Sequence[str] = ()) -> FastAPI:
    """The application; its engine runs from its start to its end."""
    api = Api(served, keys)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sys.setswitchinterval(SWITCH_SECONDS)
        served.engine.start()
        warming = asyncio.create_task(api.warm_up())
        yield
        warming.cancel()
        await asyncio.to_thread(served.engine.stop)

    app = FastAPI(title="ChatGLM-6B", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.api = api
    _add_calls(app, api)
    add_page(app)
    _add_watching(app, api)
    add_refusals(app, served.metrics)
    app.add_middleware(
        LimitBodies, most_bytes=served.settings.max_body_bytes, metrics=served.metrics
    )
    if served.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=served.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    return app


def _add_calls(app: FastAPI, api: Api) -> None:
    served, settings = api.served, api.settings
    bearer = HTTPBearer(auto_error=False)

    async def client_of(  # a plain function would take a thread's turn
        request: Request,
        key: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
    ) -> str:
        return api.client(request, key.credentials if key else None)

    Client = Annotated[str, Depends(client_of)]

    @app.post("/", responses=ERRORS)
    async def answer(body: SeedRequest, client: Client, request: Request) -> JSONResponse:
        """The released call: prompt and history to response and history."""
        history, started = body.history or [], time.monotonic()
        longest = served.most_tokens if body.max_length is None else body.max_length
        if longest > served.most_tokens:
            raise BadRequest(
                f"max_length {longest}: allowed is 2 to {served.most_tokens}", param="max_length"
            )
        prompt, dropped = await asyncio.to_thread(
            served.conversation, body.prompt, history, max_length=longest
        )
        asked = served.request(
            prompt,
            sampling_of(body.temperature, body.top_p),
            most_tokens=longest - len(prompt),
            adapter=served.adapter(None),
        )
        answers = api.submit(client, [asked])
        try:
            (text,), _ = await while_client_is_there(request.receive, answers.whole())
        finally:
            answers.close()
        _log(settings, client, [build_prompt(body.prompt, history)], started, [text])
        content = {
            "response": text,
            "history": [*history, (body.prompt, text)],
            "status": 200,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        if dropped:
            content["dropped_rounds"] = dropped  # of the history, so that the prompt fits
        return JSONResponse(content)

    @app.post("/v1/chat/completions", responses=ERRORS)
    async def chat(body: ChatRequest, client: Client, request: Request) -> Response:
        """OpenAI's chat completions."""
        return await respond(body, [body.prompt()], client, request)

    @app.post("/v1/completions", responses=ERRORS)
    async def complete(body: CompletionRequest, client: Client, request: Request) -> Response:
        """OpenAI's completions."""
        return await respond(body, body.prompts, client, request)

    async def respond(
        body: ChatRequest | CompletionRequest,
        prompts: Sequence[str | list[int]],
        client: str,
        request: Request,
    ) -> Response:
        body.check()
        adapter, started = served.adapter(body.model), time.monotonic()
        encoded = await asyncio.to_thread(lambda: [served.encode(prompt) for prompt in prompts])
        requests = [
            served.request(
                ids,
                body.sampling(),
                most_tokens=body.most_tokens,
                seed=None if body.seed is None else body.seed + number,
                adapter=adapter,
                stops=body.stops,
            )
            for ids in encoded
            for number in range(body.choices)
        ]
        shape = Shape(body.model or settings.served_model_name,
                      is_chat=isinstance(body, ChatRequest))  # fmt: skip
        answers, read = api.submit(client, requests), sum(map(len, encoded))
        log = partial(_log, settings, client, prompts, started)
        if body.stream:
            return EventStream(
                _events(answers, shape, read, includes_usage=body.includes_usage, log=log),
                on_close=answers.close,
                most_seconds=settings.deadline_seconds + settings.grace_seconds,
            )
        try:
            texts, reasons = await while_client_is_there(request.receive, answers.whole())
        finally:
            answers.close()
        log(texts)
        return JSONResponse(shape.whole(texts, reasons, usage_of(read, sum(answers.num_tokens))))

    @app.get("/v1/models", responses={401: ERRORS[401]})
    async def models(client: Client) -> dict[str, Any]:
        """The model that is served, its adapters, and the bare weights under them."""
        return {
            "object": "list",
            "data": [
                {"id": name, "object": "model", "created": served.created, "owned_by": "local",
                 "max_model_len": served.most_tokens}
                for name in served.adapters
            ],
        }  # fmt: skip


async def _events(
    answers: Answers,
    shape: Shape,
    read: int,
    *,
    includes_usage: bool,
    log: Callable[[list[str]], None],
) -> AsyncIterator[dict[str, Any] | str | None]:
    """Those of a stream."""
    texts = [""] * len(answers.num_tokens)
    for number in range(len(answers.num_tokens) if shape.is_chat else 0):
        yield shape.first(number)
    try:
        async for news in answers.updates():
            if news is None:
                yield None
            elif news[1].text or news[1].finish_reason:
                number, update = news
                texts[number] += update.text
                yield shape.piece(number, update.text, update.finish_reason)
    except Failed as error:
        yield error_body(str(error), kind="server_error")
        return
    log(texts)
    if includes_usage:
        yield shape.usage(usage_of(read, sum(answers.num_tokens)))
    yield "[DONE]"


def _log(settings: Any, client: str, prompts: Any, started: float, texts: Sequence[str]) -> None:
    if settings.log_prompts:
        seconds = time.monotonic() - started
        logger.info("%r asked %r and was answered %r in %.2f s", client, prompts, texts, seconds)


def _add_watching(app: FastAPI, api: Api) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """200 as long as requests can be answered at all."""
        engine = api.served.engine
        status = "ok" if engine.is_alive else engine.failure or "stopped"
        return JSONResponse({"status": status}, 200 if engine.is_alive else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """200 once it is warmed up."""
        is_ready = api.is_ready and api.served.engine.is_alive
        reason = {"reason": api.failure} if api.failure else {}
        return JSONResponse({"ready": is_ready, **reason}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """For Prometheus."""
        return PlainTextResponse(
            api.served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )
