"""Answers on their way to a client that goes at any moment."""

import asyncio

import pytest

from chatglm.serving.request import Update
from chatglm.serving.streams import Answers


class Endless:
    """An engine whose answers are told by the test."""

    def submit(self, requests, deliver):
        self.deliver = deliver
        return list(requests)


@pytest.mark.parametrize("turns", range(6))
def test_a_reader_that_is_cancelled_while_a_token_comes_is_cancelled(turns):
    """Whatever the event loop has done with the token by then."""

    async def run():
        engine = Endless()
        answers = Answers(engine, ["a request"])

        async def read():
            async for _ in answers.updates():
                pass

        reading = asyncio.ensure_future(read())
        await asyncio.sleep(0.01)
        engine.deliver(0, Update("a", 1))
        for _ in range(turns):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait({reading}, timeout=1)
        return reading.cancelled()

    assert asyncio.run(run())
