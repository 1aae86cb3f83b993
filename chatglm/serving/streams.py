"""Answers on their way from the engine's thread to a client, and what happens when it goes away."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .engine import Engine
from .request import Request, Update

T = TypeVar("T")
LINE_ENDS = {mark.encode(): f"\\u{ord(mark):04x}".encode() for mark in "\u2028\u2029\u0085"}
"""What some readers of events take for the end of a line."""
KEEP_ALIVE_SECONDS = 15.0
"""After so long without a token a stream says that it is alive, for the proxies in between."""


class Failed(Exception):
    """An answer ended with an error of ours. status: as HTTP has it."""

    def __init__(self, update: Update):
        super().__init__(update.error)
        self.status = update.error_status


class ClientGone(Exception):
    """Nobody is there to read the answer."""


class Answers:
    """The answers to requests that belong together, in the event loop that awaits them."""

    def __init__(self, engine: Engine, requests: Sequence[Request]):
        """Hands the requests in; EngineBusy and EngineStopped are the engine's."""
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._left = len(requests)
        self.num_tokens = [0] * len(requests)
        """Of each answer so far."""
        self._rows = engine.submit(requests, self._deliver)

    def _deliver(self, number: int, update: Update) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, update))

    def cancel(self) -> None:
        """Nobody wants them any more."""
        if self._left:
            self._engine.cancel(self._rows)

    async def updates(self) -> AsyncIterator[tuple[int, Update] | None]:
        """(number, update) until all have ended; None when nothing came for a while.

        What has come while the reader was busy is given as one update.

        Raises:
            Failed: with the reason of the first that failed.
        """
        while self._left:
            try:
                # Not wait_for: in Python 3.11 it forgets a cancellation if a token comes with it.
                async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                    number, update = await self._queue.get()
            except TimeoutError:
                yield None
                continue
            news = {number: update}
            while not self._queue.empty():
                number, update = self._queue.get_nowait()
                if number in news:
                    update.text = news[number].text + update.text
                news[number] = update
            for number, update in news.items():
                if update.error is not None:
                    self.cancel()
                    raise Failed(update)
                self._left -= update.is_last
                self.num_tokens[number] = update.num_tokens
                yield number, update

    async def whole(self) -> tuple[list[str], list[str | None]]:
        """The texts and how they ended.

        Raises:
            Failed: as `updates`.
        """
        texts = [""] * len(self._rows)
        reasons: list[str | None] = [None] * len(self._rows)
        async for news in self.updates():
            if news is not None:
                number, update = news
                texts[number] += update.text
                reasons[number] = update.finish_reason
        return texts, reasons


async def while_client_is_there(receive: Receive, work: Awaitable[T]) -> T:
    """The result of the work, which is given up when the client goes.

    Once a request: some servers tell only one who listens that the client is gone, the first.

    Raises:
        ClientGone: then.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events out of JSON objects; None is a comment that keeps the line open."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[dict[str, Any] | str | None],
        *,
        on_close: Callable[[], None],
        most_seconds: float,
    ):
        """on_close: called in any case. most_seconds: also for a client that reads slowly."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_close, self._most_seconds = events, on_close, most_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client goes or takes too long."""
        try:
            with contextlib.suppress(ClientGone, TimeoutError):
                async with asyncio.timeout(self._most_seconds):
                    await while_client_is_there(receive, self._send_all(send))
        finally:
            self._on_close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            body = _as_event(event)
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _as_event(event: dict[str, Any] | str | None) -> bytes:
    if event is None:
        return b": still there\n\n"
    if isinstance(event, str):
        return f"data: {event}\n\n".encode()
    data = orjson.dumps(event)
    for mark, escaped in LINE_ENDS.items():
        data = data.replace(mark, escaped)
    return b"data: %b\n\n" % data
