"""One shard of records out of one block of the input, whoever builds it.

A shard is done when its note (counts and size) stands beside it. Nothing here imports torch or
transformers: the processes that build start in a moment.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import numpy as np

from .corpus import encode_rounds
from .errors import ToolkitError
from .files import read_json, written_aside
from .formats import BadRecord, Rounds, parse_record
from .parts import Part, split
from .pieces import Pieces
from .records import SUFFIXES, Backend, Counts, ShardWriter, file_crc
from .sources import parse_json
from .strategies import CutRules, SpecialTokens, cut, whole

BLOCK_BYTES = 16 << 20
"""Of input that become one shard."""
RECORDS_TOGETHER = 512
"""Records whose texts are tokenised in one call."""
ID_BYTES = 4
SHOWN_CHARACTERS = 2000
"""Of a bad record, in the file of rejected ones."""


_Record = tuple[int, Any]
"""Its line, and the bytes of a JSON object, or a row of a parquet file."""


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
    """A part of one input file, `file` its place among them."""

    number: int
    file: int
    source: InputFile
    part: Part

    def records(self) -> Iterator[_Record]:
        """Line and record, as it stands in the file."""
        return self.part.read(self.source.path)


def _content(record: Any) -> Any:
    return parse_json(record) if isinstance(record, bytes) else record


def cut_blocks(files: list[InputFile]) -> Iterator[Block]:
    """The blocks of all files, numbered through."""
    numbers = itertools.count()
    for file, source in enumerate(files):
        for part in split(source.path, BLOCK_BYTES):
            yield Block(next(numbers), file, source, part)


def expected_blocks(files: list[InputFile]) -> int:
    """About how many blocks there will be."""
    return -(-sum(_records_bytes(file) for file in files) // BLOCK_BYTES) or 1


def _records_bytes(file: InputFile) -> int:
    """About the size of a file's records: gzip files end with it, modulo 4 GiB."""
    size = os.path.getsize(file.path)
    if not file.path.lower().endswith(".gz") or size < 4:
        return size
    with open(file.path, "rb") as packed:
        packed.seek(-4, os.SEEK_END)
        return int.from_bytes(packed.read(), "little")


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
        content = read_if_whole(path)
        return content and cls(**{**content, "counts": Counts.from_json(content["counts"])})


def read_if_whole(path: str) -> Any:
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
        self.pieces = Pieces(plan.vocab_file)

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
        records = block.records()
        while some := list(itertools.islice(records, RECORDS_TOGETHER)):
            paragraphs = self._accepted(block, some, counts, rejected)
            encoded = encode_rounds(paragraphs, self.pieces)
            for fits, run in itertools.groupby(encoded, lambda e: len(e[1]) + len(e[2]) <= room):
                rounds = list(run)
                counts.rounds += len(rounds)
                if fits:  # most do, and are spared the arrays
                    contexts = [len(prompt) // ID_BYTES + 1 for _, prompt, _ in rounds]
                    writer.write_ids(contexts, [whole(p, a, special) for _, p, a in rounds])
                    continue
                for _, *parts in rounds:
                    ids, learned = (np.frombuffer(part, dtype=np.int32) for part in parts)
                    for sample in cut(ids, learned, special, rules, generator):
                        writer.write(sample)
                        counts.add_cuts(sample)

    def _accepted(
        self, block: Block, records: list[_Record], counts: Counts, rejected: _Rejected
    ) -> list[Rounds]:
        form = block.source.form
        try:  # all are good, nearly always
            paragraphs = [parse_record(_content(record), form) for _, record in records]
        except BadRecord:
            paragraphs = []
            for line, record in records:
                try:
                    paragraphs.append(parse_record(_content(record), form))
                except BadRecord as bad:
                    counts.rejected += 1
                    rejected.add(block.source.path, line, str(bad), record)
        counts.records += len(paragraphs)
        return paragraphs


def finished_note(block: Block, folder: str) -> Note | None:
    """The note of a block's shard, if it was built before."""
    return Note.load(os.path.join(folder, f"{block.number:05d}.json"))
