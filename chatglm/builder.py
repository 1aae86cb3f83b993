"""From files of any size to a folder of records: in shards, by several processes, with restart.

The input is cut into blocks of about BLOCK_BYTES, in order, whoever builds them; a block becomes a
shard in one process. So the same bytes come out for any number of processes, a restart after a kill
goes on with the shards that are missing, and the memory taken is that of a few blocks. A shard is
done when its note (counts and size) stands beside it; the notes become the manifest.
"""

import contextlib
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from .corpus import encode_rounds
from .errors import ToolkitError
from .files import read_json, replace_folder, written_aside
from .formats import BadRecord, Rounds, parse_record
from .pictures import draw_lengths
from .records import (
    INDEX,
    SUFFIXES,
    Backend,
    Counts,
    RecordFolder,
    ShardWriter,
    file_crc,
    manifest_path,
    read_manifest,
)
from .sources import kind_of_file, parquet_groups, parse_json, read_parquet, read_raw
from .strategies import CutRules, SpecialTokens, cut, whole
from .tokenizer import ChatGLMTokenizer

BLOCK_BYTES = 16 << 20
"""Of input that become one shard."""
RECORDS_TOGETHER = 512
"""Records whose texts are tokenised in one call."""
ID_BYTES = 4
SHOWN_CHARACTERS = 2000
"""Of a bad record, in the file of rejected ones."""
ENOUGH_TO_JUDGE = 1000
"""Records after which too many bad ones stop a build before its end."""


@dataclass(frozen=True)
class BuildPlan:
    """What turns the records of files into samples; the same in every process."""

    vocab_file: str
    special: SpecialTokens
    rules: CutRules
    backend: Backend
    seed: int


@dataclass(frozen=True)
class InputFile:
    """A file of records, and the format that they are in."""

    path: str
    form: str

    def state(self) -> dict[str, Any]:
        """What changes when the file does; cheaper than its hash."""
        found = os.stat(self.path)
        return {**asdict(self), "bytes": found.st_size, "modified": found.st_mtime_ns}


@dataclass(frozen=True)
class Block:
    """A stretch of one input file: raw records with their lines, or a row group of parquet."""

    number: int
    file: int
    source: InputFile
    lines: list[int]
    texts: list[bytes]
    group: int | None = None

    def records(self) -> Iterator[tuple[int, Any, Any]]:
        """(line, as it stands in the file, content) of each record; content may be a BadRecord."""
        if self.group is not None:
            for line, row in read_parquet(self.source.path, self.group):
                yield line, row, row
        for line, text in zip(self.lines, self.texts, strict=True):
            try:
                yield line, text, parse_json(text)
            except BadRecord as bad:
                yield line, text, bad


def cut_blocks(files: list[InputFile]) -> Iterator[Block]:
    """The blocks of all files, numbered through."""
    numbers = itertools.count()
    for file, source in enumerate(files):
        if kind_of_file(source.path) == "parquet":
            for group in range(parquet_groups(source.path)):
                yield Block(next(numbers), file, source, [], [], group)
            continue
        lines: list[int] = []
        texts: list[bytes] = []
        size = 0
        for line, text in read_raw(source.path):
            lines.append(line)
            texts.append(text)
            size += len(text)
            if size >= BLOCK_BYTES:
                yield Block(next(numbers), file, source, lines, texts)
                lines, texts, size = [], [], 0
        if texts:
            yield Block(next(numbers), file, source, lines, texts)


@dataclass(frozen=True)
class Note:
    """What is known of a finished shard."""

    name: str
    bytes: int
    crc: int
    counts: Counts
    first_rejected: str

    def save(self, path: str) -> None:
        """As JSON, aside and then renamed."""
        with written_aside(path) as file:
            json.dump({**vars(self), "counts": self.counts.as_json()}, file, ensure_ascii=False)

    @classmethod
    def load(cls, path: str) -> "Note | None":
        """None where there is none yet."""
        content = _read_if_whole(path)
        return content and cls(**{**content, "counts": Counts.from_json(content["counts"])})


def _read_if_whole(path: str) -> Any:
    """The JSON object in a file, or None: it is not there, or a power cut left it empty."""
    try:
        return read_json(path)
    except ToolkitError:
        return None


class _Rejected:
    """Bad records, written down one JSON object a line."""

    def __init__(self, file: TextIO):
        self.file, self.first = file, ""

    def add(self, path: str, line: int, reason: str, record: Any) -> None:
        is_text = isinstance(record, bytes)
        shown = record.decode(errors="replace").strip() if is_text else repr(record)
        fault = {"file": path, "line": line, "reason": reason, "record": shown[:SHOWN_CHARACTERS]}
        self.file.write(json.dumps(fault, ensure_ascii=False) + "\n")
        self.first = self.first or f"{path}:{line}: {reason}"


class ShardBuilder:
    """Builds the shards of blocks into a folder, in whatever process it lives in."""

    def __init__(self, plan: BuildPlan, folder: str):
        self.plan, self.folder = plan, folder
        self.tokenizer = ChatGLMTokenizer(plan.vocab_file)

    def build(self, block: Block) -> Note:
        """A block's shard, index and bad records, and last its note."""
        stem = os.path.join(self.folder, f"{block.number:05d}")
        path, counts = stem + SUFFIXES[self.plan.backend], Counts()
        pathlib.Path(path).unlink(missing_ok=True)  # a kill's
        with (
            open(f"{stem}.rejected", "w", encoding="utf-8") as file,
            ShardWriter(path, backend=self.plan.backend, file=block.file) as writer,
        ):
            rejected = _Rejected(file)
            self._write(block, writer, counts, rejected)
        index = writer.index()
        index.tofile(f"{stem}.index")
        counts.add_lengths(index)
        size, crc = os.path.getsize(path), file_crc(path)
        note = Note(os.path.basename(path), size, crc, counts, rejected.first)
        note.save(f"{stem}.json")
        return note

    def _write(
        self, block: Block, writer: ShardWriter, counts: Counts, rejected: _Rejected
    ) -> None:
        rules, special = self.plan.rules, self.plan.special
        room = rules.room * ID_BYTES
        generator = np.random.default_rng((self.plan.seed, block.number))
        accepted = self._accepted(block, counts, rejected)
        while paragraphs := list(itertools.islice(accepted, RECORDS_TOGETHER)):
            for _, prompt, answer in encode_rounds(paragraphs, self.tokenizer):
                counts.rounds += 1
                if len(prompt) + len(answer) <= room:  # most do, and are spared the arrays
                    writer.write_ids(len(prompt) // ID_BYTES + 1, whole(prompt, answer, special))
                    continue
                ids, learned = (np.frombuffer(part, dtype=np.int32) for part in (prompt, answer))
                for sample in cut(ids, learned, special, rules, generator):
                    writer.write(sample)
                    counts.add_cuts(sample)

    def _accepted(self, block: Block, counts: Counts, rejected: _Rejected) -> Iterator[Rounds]:
        for line, record, content in block.records():
            try:
                rounds = parse_record(content, block.source.form)
            except BadRecord as bad:
                counts.rejected += 1
                rejected.add(block.source.path, line, str(bad), record)
            else:
                counts.records += 1
                yield rounds


def file_hash(path: str) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        yield from (_finished(block, folder) or builder.build(block) for block in blocks)
        return
    pending: deque[Any] = deque()
    with ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),  # threads of torch don't survive a fork
        initializer=_start_worker,
        initargs=(plan, folder),
    ) as pool:
        try:
            for block in blocks:
                note = _finished(block, folder)
                pending.append(note or pool.submit(_build_in_worker, block))
                if len(pending) > 2 * num_workers:  # so that blocks don't pile up
                    yield _result(pending.popleft())
            while pending:
                yield _result(pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _finished(block: Block, folder: str) -> Note | None:
    return Note.load(os.path.join(folder, f"{block.number:05d}.json"))


def _result(pending: Any) -> Note:
    return pending if isinstance(pending, Note) else pending.result()


def build_records(
    folder: str,
    files: list[InputFile],
    plan: BuildPlan,
    source: dict[str, Any],
    *,
    num_workers: int,
    max_rejected: float,
) -> None:
    """Build a folder of records beside its place, then put it there.

    source: what the manifest says it is built from, beside the files. max_rejected: the share of
    bad records that is put up with.

    Raises:
        ToolkitError: for too many bad records, no sample at all, a file that changes meanwhile, a
            full disk or a killed process; the older folder stands then.
    """
    part = f"{folder}.part"
    try:
        states = [file.state() for file in files]
        done = _begin(part, {"source": source, "files": states})
        if done:
            print(f"{part}: going on after {done} finished shards")
        notes = _build_while_good(part, files, plan, num_workers, max_rejected)
        total = _total(notes)
        _gather_rejected(notes, part, f"{folder}.rejected.jsonl")
        _refuse_rejected(notes, total, max_rejected, f"{folder}.rejected.jsonl")
        if not total.samples:
            names = ", ".join(file.path for file in files)
            raise ToolkitError(f"{folder}: its source holds no samples: {names}")
        if [file.state() for file in files] != states:
            raise ToolkitError(f"{folder}: its files changed meanwhile; start the command again")
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
    part: str, files: list[InputFile], plan: BuildPlan, num_workers: int, max_rejected: float
) -> list[Note]:
    """The notes of all shards, or of those up to which too many records are bad."""
    expected = -(-sum(map(_records_bytes, files)) // BLOCK_BYTES) or 1
    shards = build_shards(cut_blocks(files), plan, part, num_workers=min(num_workers, expected))
    notes, total = [], Counts()
    with contextlib.closing(shards), tqdm(total=expected, unit="shard", disable=None) as bar:
        for note in shards:
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


def _records_bytes(file: InputFile) -> int:
    """About the size of a file's records: gzip files end with it, modulo 4 GiB."""
    size = os.path.getsize(file.path)
    if not file.path.lower().endswith(".gz") or size < 4:
        return size
    with open(file.path, "rb") as packed:
        packed.seek(-4, os.SEEK_END)
        return int.from_bytes(packed.read(), "little")


def _begin(part: str, key: dict[str, Any]) -> int:
    """Take up an unfinished folder if it is of the same files and settings; its shards so far."""
    path, wanted = os.path.join(part, "key.json"), json.loads(json.dumps(key))
    if _read_if_whole(path) == wanted:
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
    hashes = {state["path"]: file_hash(state["path"]) for state in states}
    manifest = {
        "source": {**source, "data": hashes},
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
