"""From files of any size to a folder of records: in shards, by several processes, with restart.

The input is cut into blocks of about BLOCK_BYTES, in order, whoever builds them; a block becomes a
shard in one process. So the same bytes come out for any number of processes, a restart after a kill
goes on with the shards that are missing, and the memory taken is that of a few blocks. A shard is
done when its note (counts and size) stands beside it; the notes become the manifest.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from tqdm import tqdm

from .errors import ToolkitError
from .files import replace_folder, written_aside
from .pictures import draw_lengths
from .records import INDEX, Counts, RecordFolder, file_crc, manifest_path, read_manifest
from .shards import BuildPlan, InputFile, Note, cut_blocks, expected_blocks, read_if_whole
from .workers import build_shards

ShardsBuilder = Callable[..., Generator[Note, None, None]]
"""What `build_shards` in workers.py is: (blocks, plan, folder, num_workers=) to the notes."""
ENOUGH_TO_JUDGE = 1000
"""Records after which too many bad ones stop a build before its end."""


def file_hash(path: str) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _InBackground:
    """A function's result, worked out in a thread; the script may end without it."""

    def __init__(self, work: Callable[[], Any]):
        self._found: Future = Future()
        threading.Thread(target=self._run, args=(work,), daemon=True).start()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._found.set_result(work())
        except OSError as error:
            self._found.set_exception(error)

    def result(self) -> Any:
        """Wait for it; an OSError comes up here."""
        return self._found.result()


def build_records(
    folder: str,
    files: list[InputFile],
    plan: BuildPlan,
    source: dict[str, Any],
    *,
    num_workers: int,
    max_rejected: float,
    build_shards: ShardsBuilder = build_shards,
) -> None:
    """Build a folder of records beside its place, then put it there.

    source: what the manifest says it is built from, beside the files. max_rejected: the share of
    bad records that is put up with. build_shards: who builds, see ray_workers.py.

    Raises:
        ToolkitError: for too many bad records, no sample at all, a file that changes meanwhile, a
            full disk or a killed process; the older folder stands then.
    """
    part = f"{folder}.part"
    try:
        states = [file.state() for file in files]
        hashes = _InBackground(lambda: {file.path: file_hash(file.path) for file in files})
        done = _begin(part, {"source": source, "files": states})
        if done:
            print(f"{part}: going on after {done} finished shards")
        expected = expected_blocks(files)
        building = build_shards(
            cut_blocks(files), plan, part, num_workers=min(num_workers, expected)
        )
        notes = _build_while_good(building, expected, max_rejected)
        total = _total(notes)
        _gather_rejected(notes, part, f"{folder}.rejected.jsonl")
        _refuse_rejected(notes, total, max_rejected, f"{folder}.rejected.jsonl")
        if not total.samples:
            names = ", ".join(file.path for file in files)
            raise ToolkitError(f"{folder}: its source holds no samples: {names}")
        if [file.state() for file in files] != states:
            raise ToolkitError(f"{folder}: its files changed meanwhile; start the command again")
        source = {**source, "data": hashes.result()}
        _finish(part, notes, total, plan=plan, source=source, states=states)
        replace_folder(part, folder)
    except BrokenProcessPool:
        raise ToolkitError(
            "a process that builds records was killed, perhaps for want of memory: set a lower"
            " num_process_worker; the same command goes on with what is built"
        ) from None
    except OSError as error:
        raise ToolkitError(
            f"{part}: could not be written ({error}); make room there, and the same command goes on"
            " with what is built"
        ) from None


def _build_while_good(
    building: Generator[Note, None, None], expected: int, max_rejected: float
) -> list[Note]:
    """The notes of all shards, or of those up to which too many records are bad."""
    notes, total = [], Counts()
    with contextlib.closing(building), tqdm(total=expected, unit="shard", disable=None) as bar:
        for note in building:
            notes.append(note)
            total.merge(note.counts)
            bar.set_postfix_str(f"{total.samples:,} samples", refresh=False)
            bar.update()
            judged = total.records + total.rejected
            if judged >= ENOUGH_TO_JUDGE and total.rejected > max_rejected * judged:
                break
    return notes


def _total(notes: list[Note]) -> Counts:
    total = Counts()
    for note in notes:
        total.merge(note.counts)
    return total


def _refuse_rejected(notes: list[Note], total: Counts, max_rejected: float, path: str) -> None:
    judged = total.records + total.rejected
    if total.rejected > max_rejected * judged:
        first = next(note.first_rejected for note in notes if note.first_rejected)
        raise ToolkitError(
            f"{first}; {total.rejected:,} of {judged:,} records are bad, and max_rejected is"
            f" {max_rejected:g} of them: mend those in {path}, or raise it"
        )


def _begin(part: str, key: dict[str, Any]) -> int:
    """Take up an unfinished folder if it is of the same files and settings; its shards so far."""
    path, wanted = os.path.join(part, "key.json"), json.loads(json.dumps(key))
    if read_if_whole(path) == wanted:
        return sum(name.endswith(".json") for name in os.listdir(part)) - 1
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    with written_aside(path) as file:
        json.dump(key, file)
    return 0


def _gather_rejected(notes: list[Note], part: str, path: str) -> None:
    """One file of all bad records, or none."""
    pathlib.Path(path).unlink(missing_ok=True)
    if any(note.counts.rejected for note in notes):
        with written_aside(path) as file:
            for note in notes:
                with open(_beside(part, note, ".rejected"), encoding="utf-8") as lines:
                    shutil.copyfileobj(lines, file)


def _beside(part: str, note: Note, suffix: str) -> str:
    return os.path.join(part, os.path.splitext(note.name)[0] + suffix)


def _finish(part: str, notes: list[Note], total: Counts, *, plan, source, states) -> None:
    """Index, picture and manifest; the notes and their like are gone."""
    index = os.path.join(part, "index.npy")
    with open(index, "wb") as file:
        description = np.lib.format.dtype_to_descr(INDEX)
        shape = {"descr": description, "fortran_order": False, "shape": (total.samples,)}
        np.lib.format.write_array_header_1_0(file, shape)
        for note in notes:
            with open(_beside(part, note, ".index"), "rb") as rows:
                shutil.copyfileobj(rows, file)
    draw_lengths(os.path.join(part, "lengths.png"), total.lengths)
    manifest = {
        "source": source,
        "files": states,
        "backend": plan.backend,
        "counts": total.as_json(),
        "index_bytes": os.path.getsize(index),
        "index_crc": file_crc(index),
        "shards": [{"name": note.name, "samples": note.counts.samples, "bytes": note.bytes,
                    "crc": note.crc} for note in notes],
    }  # fmt: skip
    with written_aside(manifest_path(part)) as file:
        json.dump(manifest, file, ensure_ascii=False, indent=1)
    for note in notes:
        for suffix in (".json", ".index", ".rejected"):  # without its note a shard is built anew
            os.remove(_beside(part, note, suffix))
    os.remove(os.path.join(part, "key.json"))


def reason_to_rebuild(folder: str, files: list[InputFile], source: dict[str, Any]) -> str | None:
    """Why a folder of records can't be used for these files and settings, or None if it can."""
    if not os.path.exists(manifest_path(folder)):
        return "not built yet"
    try:
        manifest = read_manifest(folder)
    except ToolkitError:
        return "its manifest cannot be read"
    for key in source:
        if manifest["source"].get(key) != source[key]:
            return f"{key} changed"
    hashes = manifest["source"]["data"]
    named = [(state["path"], state["form"]) for state in manifest["files"]]
    if named != [(file.path, file.form) for file in files]:
        return "data changed"
    for file, state in zip(files, manifest["files"], strict=True):
        if file.state() != state and file_hash(file.path) != hashes[file.path]:
            return "data changed"
    try:
        RecordFolder(folder)
    except ToolkitError:
        return "a file of it was changed"
    return None
