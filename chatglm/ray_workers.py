"""Shards built as a Ray Data job, on as many machines as a Ray cluster has.

The same blocks, the same builder and the same notes as in workers.py, so that the same bytes come
out. Every machine must see the files and the folder under the same path. The cluster is the one at
RAY_ADDRESS; without it, one is started on this machine and ends with the script.
"""

import itertools
import logging
import os
import pathlib
import pickle
from collections.abc import Generator, Iterable
from typing import Any

from .errors import ToolkitError
from .shards import Block, BuildPlan, Note, ShardBuilder, finished_note

BLOCKS_TOGETHER = 256
"""Blocks of one job, which holds them all at once, and those of gzip files hold their records."""


class _Builder:
    """What Ray Data keeps in each of its processes."""

    def __init__(self, plan: BuildPlan, folder: str):
        self.builder = ShardBuilder(plan, folder)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"result": pickle.dumps(self.builder.build(pickle.loads(row["block"])))}
        except ToolkitError as error:
            return {"result": pickle.dumps(error)}


def build_shards_with_ray(
    blocks: Iterable[Block], plan: BuildPlan, folder: str, *, num_workers: int
) -> Generator[Note, None, None]:
    """The notes of the blocks' shards, in order; those that are finished are not built again.

    Raises:
        ToolkitError: if Ray is missing, or its cluster can't be reached.
    """
    ray = _connect(num_workers)
    folder = os.path.abspath(folder)
    waiting = iter(blocks)
    while together := list(itertools.islice(waiting, BLOCKS_TOGETHER)):
        notes = {block.number: finished_note(block, folder) for block in together}
        to_build = [block for block in together if notes[block.number] is None]
        built = _run(ray, to_build, plan, folder, num_workers) if to_build else iter(())
        for block in together:
            yield notes[block.number] or next(built)


def _connect(num_workers: int):
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ToolkitError(
            "build_with ray needs Ray; run: pip install -r requirements-ray.txt"
        ) from None
    if ray.is_initialized():
        return ray
    address = os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {} if address else {"num_cpus": num_workers, "include_dashboard": False}
    package = {"py_modules": [str(pathlib.Path(__file__).parent)]}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        ray.init(address, **own, **quiet, runtime_env=package)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ToolkitError(f"build_with ray: no cluster ({error}); see RAY_ADDRESS") from None
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # the builder shows its own
    return ray


def _run(ray, blocks: list[Block], plan: BuildPlan, folder: str, num_workers: int):
    rows = [{"block": pickle.dumps(block)} for block in blocks]
    built = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Builder,
        fn_constructor_args=(plan, folder),
        compute=ray.data.ActorPoolStrategy(size=min(num_workers, len(rows))),
    )
    for row in built.iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, ToolkitError):
            raise result
        yield result
