"""The HTTP application: the released call, OpenAI's, a chat page, health and metrics."""

import asyncio
import contextlib
import hmac
import importlib.resources
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ..errors import ToolkitError
from ..prompts import build_prompt
from ..sampling import Sampling
from .bodies import LimitBodies
from .engine import EngineBusy, EngineStopped
from .messages import (
    NEUTRAL_ONLY,
    BadRequest,
    ChatRequest,
    CompletionRequest,
    SeedRequest,
    Shape,
    error_body,
    sampling_of,
    usage_of,
)
from .served import Served
from .streams import Answers, ClientGone, EventStream, Failed, while_client_is_there

logger = logging.getLogger("chatglm")

WARM_UP_TOKENS = 4
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The chat page loads its own files and calls its own server, and no script in an answer runs."""
PAGE_FILES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
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


class TooMany(Exception):
    """A client has as many requests as it may have."""


class Api:
    """The calls, over what is served. keys: who has none of them is refused, if there are any."""

    def __init__(self, served: Served, keys: Sequence[str] = ()):
        self.served, self.settings = served, served.settings
        self.is_ready = False
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
        if self._running[client] + len(requests) > most and self._running[client]:
            self.served.metrics.refused("client_limit")
            raise TooMany(f"this client has {self._running[client]} requests running, of {most}")
        return _Counted(self.served, requests, self._running, client)

    async def warm_up(self) -> None:
        """Answer something, so that whatever is made at first use is made."""
        prompt = self.served.encode("你好")
        most = min(WARM_UP_TOKENS, self.served.most_tokens - len(prompt))
        request = self.served.request(prompt, Sampling(), most_tokens=max(most, 1), seed=0)
        started = time.monotonic()
        await Answers(self.served.engine, [request]).whole()
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
        served.engine.start()
        warming = asyncio.create_task(api.warm_up())
        yield
        warming.cancel()
        await asyncio.to_thread(served.engine.stop)

    app = FastAPI(title="ChatGLM-6B", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.api = api
    _add_calls(app, api)
    _add_page(app)
    _add_watching(app, api)
    _add_errors(app, served)
    app.add_middleware(LimitBodies, most_bytes=served.settings.max_body_bytes)
    if served.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=served.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _add_calls(app: FastAPI, api: Api) -> None:
    served, settings = api.served, api.settings
    bearer = HTTPBearer(auto_error=False)

    def client_of(
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
        _log(settings, client, build_prompt(body.prompt, history), [text], started)
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
        if body.stream:
            return EventStream(
                _events(answers, shape, read, includes_usage=body.includes_usage),
                on_close=answers.close,
                most_seconds=settings.deadline_seconds + settings.grace_seconds,
            )
        try:
            texts, reasons = await while_client_is_there(request.receive, answers.whole())
        finally:
            answers.close()
        _log(settings, client, prompts[0], texts, started)
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
    answers: Answers, shape: Shape, read: int, *, includes_usage: bool
) -> AsyncIterator[dict[str, Any] | str | None]:
    """Those of a stream."""
    for number in range(len(answers.num_tokens) if shape.is_chat else 0):
        yield shape.first(number)
    try:
        async for news in answers.updates():
            if news is None:
                yield None
            elif news[1].text or news[1].finish_reason:
                number, update = news
                yield shape.piece(number, update.text, update.finish_reason)
    except Failed as error:
        yield error_body(str(error), kind="server_error")
        return
    if includes_usage:
        yield shape.usage(usage_of(read, sum(answers.num_tokens)))
    yield "[DONE]"


def _log(settings: Any, client: str, prompt: Any, texts: Sequence[str], started: float) -> None:
    if settings.log_prompts:
        seconds = time.monotonic() - started
        logger.info("%s asked %r and was answered %r in %.2f s", client, prompt, texts, seconds)


def _add_page(app: FastAPI) -> None:
    folder = importlib.resources.files(__package__) / "page"
    headers = {
        "Content-Security-Policy": PAGE_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    def part(name: str) -> Response:
        kind = PAGE_FILES[name[name.rindex(".") :]]
        return Response((folder / name).read_bytes(), media_type=kind, headers=headers)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        """The chat page."""
        return part("index.html")

    names = {file.name for file in folder.iterdir() if file.is_file()}

    @app.get("/page/{name}", include_in_schema=False)
    async def file_of_page(name: str) -> Response:
        """Its files."""
        if name not in names:
            raise HTTPException(404, f"the page has no file {name!r}")
        return part(name)


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
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """For Prometheus."""
        return PlainTextResponse(
            api.served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def _add_errors(app: FastAPI, served: Served) -> None:
    def refuse(status: int, message: str, kind: str, **more: Any) -> JSONResponse:
        headers = more.pop("headers", None)
        return JSONResponse(error_body(message, kind=kind, **more), status, headers=headers)

    def busy(message: str, seconds: float, status: int) -> JSONResponse:
        kind = "server_error" if status == 503 else "rate_limit_error"
        return refuse(status, message, kind, headers={"Retry-After": str(math.ceil(seconds))})

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        param = ".".join(place) or None
        served.metrics.refused("invalid")
        reason = first["msg"]
        if place and place[0] in NEUTRAL_ONLY:
            reason = f"this server can't honour it ({reason}): leave it out"
        message = f"{param}: {reason}" if param else f"the request: {reason}"
        return refuse(400, message, "invalid_request_error", param=param)

    @app.exception_handler(ToolkitError)
    async def mistaken(_: Request, error: ToolkitError) -> JSONResponse:
        served.metrics.refused("invalid")
        param, code = getattr(error, "param", None), getattr(error, "code", None)
        status = 404 if code == "model_not_found" else 400
        return refuse(status, str(error), "invalid_request_error", param=param, code=code)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        kind = "authentication_error" if error.status_code == 401 else "invalid_request_error"
        code = "invalid_api_key" if error.status_code == 401 else None
        headers = dict(error.headers or {})
        if error.status_code == 401:
            served.metrics.refused("key")
            headers["WWW-Authenticate"] = "Bearer"
        return refuse(error.status_code, str(error.detail), kind, code=code, headers=headers)

    @app.exception_handler(EngineBusy)
    async def queue_full(_: Request, error: EngineBusy) -> JSONResponse:
        served.metrics.refused("queue_full")
        return busy(str(error), error.retry_after_seconds, 503)

    @app.exception_handler(EngineStopped)
    async def stopped(_: Request, error: EngineStopped) -> JSONResponse:
        return busy(str(error), 5, 503)

    @app.exception_handler(TooMany)
    async def too_many(_: Request, error: TooMany) -> JSONResponse:
        return busy(str(error), 1, 429)

    @app.exception_handler(Failed)
    async def failed(_: Request, error: Failed) -> JSONResponse:
        return refuse(error.status, str(error), "server_error")

    @app.exception_handler(ClientGone)
    async def gone(_: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it
