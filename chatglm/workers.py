"""The processes that build shards.

They are started anew, since torch's threads don't survive a fork, and without the script that
started them: it brings torch and transformers along, which no shard needs.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any

from .shards import Block, BuildPlan, Note, ShardBuilder, finished_note

_builder: ShardBuilder
"""Of a worker process."""


def _start_worker(plan: BuildPlan, folder: str) -> None:
    global _builder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to deal with
    _builder = ShardBuilder(plan, folder)
    gc.set_threshold(100_000)  # so many records set it off all the time, and none is a cycle
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """A worker whose parent was killed would wait for work for ever."""
    wait([sentinel])
    os._exit(1)


def _build_in_worker(block: Block) -> Note:
    return _builder.build(block)


def build_shards(
    blocks: Iterable[Block], plan: BuildPlan, folder: str, *, num_workers: int
) -> Generator[Note, None, None]:
    """The notes of the blocks' shards, in order; those that are finished are not built again."""
    if num_workers == 1:
        builder = ShardBuilder(plan, folder)
        yield from (finished_note(block, folder) or builder.build(block) for block in blocks)
        return
    pending: deque[Any] = deque()
    with ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(plan, folder),
    ) as pool:
        try:
            with _without_the_script():
                pool.submit(os.getpid)  # the first call starts all processes
            for block in blocks:
                note = finished_note(block, folder)
                pending.append(note or pool.submit(_build_in_worker, block))
                if len(pending) > 2 * num_workers:  # so that blocks don't pile up
                    yield _result(pending.popleft())
            while pending:
                yield _result(pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _without_the_script() -> Iterator[None]:
    """A process that starts meanwhile doesn't import the script that runs."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _result(pending: Any) -> Note:
    return pending if isinstance(pending, Note) else pending.result()
