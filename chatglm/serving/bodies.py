"""Requests that are too large, or come too slowly, end before anything is made of them."""

import asyncio

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .messages import error_body
from .metrics import Metrics

BODY_SECONDS = 30.0
"""For a request to come whole."""


class LimitBodies:
    """Reads a body, up to most_bytes of it, and only then lets the application have it."""

    def __init__(self, app: ASGIApp, most_bytes: int, metrics: Metrics):
        self.app, self.most_bytes, self.metrics = app, most_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._read(receive)
        except TimeoutError:
            self.metrics.refused("too_slow")
            await _refuse(408, "the request did not come whole in time")(scope, receive, send)
            return
        if body is None:
            self.metrics.refused("too_large")
            message = f"the request is larger than {self.most_bytes} bytes"
            await _refuse(413, message)(scope, receive, send)
            return
        given = False

        async def receive_again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_again, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, or None if it is too large."""
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.most_bytes:
                return None
            more = message.get("more_body", False)
        return b"".join(parts)


def _refuse(status: int, message: str) -> JSONResponse:
    headers = {"Connection": "close"}
    return JSONResponse(error_body(message, kind="invalid_request_error"), status, headers=headers)
