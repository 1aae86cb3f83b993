"""Whatever goes wrong, as an answer in OpenAI's form, with the status that clients act on."""

import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ..errors import ToolkitError
from .engine import EngineBusy, EngineStopped
from .messages import NEUTRAL_ONLY, error_body
from .metrics import Metrics
from .streams import ClientGone, Failed

STOPPED_RETRY_SECONDS = 5


class TooMany(Exception):
    """A client has as many requests as it may have."""


class Refused(Exception):
    """An error as it is answered. reason: its word in the metrics."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        reason: str | None = None,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.reason, self.headers = status, reason, headers
        self.body = error_body(message, kind=kind, param=param, code=code)


def refused(error: Exception) -> Refused:
    """What an error means for the client."""
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, ToolkitError):
        param, code = getattr(error, "param", None), getattr(error, "code", None)
        status = 404 if code == "model_not_found" else 400
        return Refused(status, str(error), reason="invalid", param=param, code=code)
    if isinstance(error, HTTPException):
        return _http(error)
    if isinstance(error, EngineBusy):
        return _later(503, str(error), error.retry_after_seconds, reason="queue_full")
    if isinstance(error, TooMany):
        return _later(429, str(error), 1, reason="client_limit")
    if isinstance(error, Failed):
        return Refused(error.status, str(error), kind="server_error")
    assert isinstance(error, EngineStopped)
    return _later(503, str(error), STOPPED_RETRY_SECONDS, reason="stopped")


def _invalid(error: RequestValidationError) -> Refused:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        message = f"the request is not JSON (at character {first['loc'][-1]})"
        return Refused(400, message, reason="invalid")
    place = [str(part) for part in first["loc"] if part != "body"]
    param, reason = ".".join(place) or None, first["msg"]
    if place and place[0] in NEUTRAL_ONLY:
        reason = f"this server can't honour it ({reason}): leave it out"
    message = f"{param or 'the request'}: {reason}"
    return Refused(400, message, reason="invalid", param=param)


def _http(error: HTTPException) -> Refused:
    if error.status_code != 401:
        return Refused(
            error.status_code,
            str(error.detail),
            reason=f"http_{error.status_code}",
            headers=dict(error.headers or {}),
        )
    return Refused(
        401,
        str(error.detail),
        reason="key",
        kind="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _later(status: int, message: str, seconds: float, *, reason: str) -> Refused:
    kind = "server_error" if status == 503 else "rate_limit_error"
    headers = {"Retry-After": str(math.ceil(seconds))}
    return Refused(status, message, reason=reason, kind=kind, headers=headers)


def add_refusals(app: FastAPI, metrics: Metrics) -> None:
    """Answer every error that `refused` knows."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        known = refused(error)
        if known.reason:
            metrics.refused(known.reason)
        return JSONResponse(known.body, known.status, headers=known.headers)

    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        metrics.refused("unforeseen")  # its traceback is logged
        return JSONResponse(error_body("the server failed", kind="server_error"), 500)

    async def nobody(_: Request, error: Exception) -> Response:
        return Response(status_code=499)

    for kind in (RequestValidationError, ToolkitError, HTTPException, EngineBusy, EngineStopped,
                 TooMany, Failed):  # fmt: skip
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(ClientGone, nobody)
    app.add_exception_handler(Exception, unforeseen)
