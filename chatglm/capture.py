"""Work of a GPU as a CUDA graph."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch


def capture(work: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    """A graph of the work, which is done once besides; what it holds on to must be kept.

    pool: see new_pool.
    """
    torch.cuda.synchronize()  # what the work reads may still be on its way
    stream = _stream(torch.cuda.current_device(), threading.get_ident())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()  # compiles what is not compiled yet, and lets libraries set themselves up
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(  # other threads may go on
        graph, pool=pool, stream=stream, capture_error_mode="thread_local"
    ):
        work()
    torch.cuda.synchronize()
    return graph


def new_pool() -> Any:
    """Memory that graphs share, of which one runs at a time."""
    return torch.cuda.graph_pool_handle()


@functools.cache
def _stream(device: int, thread: int) -> torch.cuda.Stream:
    """One for all captures of a thread: cuBLAS keeps memory for each stream that it has seen."""
    return torch.cuda.Stream(device)
