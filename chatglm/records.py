"""Built samples on disk: a folder of shards, an index of all their samples, and a manifest.

    output/train/manifest.json    what it was built from, counts, lengths, every shard's size
                 index.npy        of every sample: where it is, its length, its file (INDEX)
                 00000.record     shards, in the order of the input
                 lengths.png      how long they are

A sample is int32, little-endian: the context length, then the token ids, unpadded, with a CRC-32C.
Two kinds of shard: TFRecord files, and LMDB files, which take a fifth more room. TFRecords are
framed here and not by the `tfrecords` package, whose reader fills a buffer anew at every seek: it
gives a thousand samples a second in random order, a mapped file some hundred thousand.
"""

import bisect
import itertools
import mmap
import operator
import os
import resource
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import google_crc32c
import lmdb
import numpy as np

from .errors import ToolkitError
from .files import read_json
from .strategies import Sample

Backend = Literal["record", "lmdb"]
SUFFIXES: dict[str, str] = {"record": ".record", "lmdb": ".lmdb"}
INDEX = np.dtype([("offset", "<u8"), ("tokens", "<u4"), ("context", "<u4"), ("file", "<u4"),
                  ("cuts", "<u4")])  # fmt: skip
"""offset: the byte of a TFRecord, or the number of an LMDB entry, within the shard. file: the place
of the input file in the manifest. cuts: 1 if the prompt was cut, plus 2 if the answer was."""
_INT32, _UINT32, _ROW = struct.Struct("<i"), struct.Struct("<I"), struct.Struct("<QIIII")
_IDS = np.dtype("<i4")
HEADER, FOOTER = 12, 4  # of a TFRecord: length and its CRC; the CRC of the data
CRC_OF_SOUND = 0x48674BC7
"""The CRC-32C of any data with its CRC-32C behind it."""
BUILD = "build the records anew: delete {folder} and run python data_utils.py"


@dataclass
class Counts:
    """What went into a folder of records."""

    records: int = 0
    rejected: int = 0
    rounds: int = 0
    rounds_in_windows: int = 0
    samples: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    prompts_cut: int = 0
    answers_cut: int = 0
    longest: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    """How many samples have so many tokens."""

    def add_cuts(self, sample: Sample) -> None:
        """Count what was cut from a sample."""
        self.rounds_in_windows += sample.window == 1
        self.prompts_cut += sample.prompt_cut
        self.answers_cut += sample.answer_cut

    def add_lengths(self, index: np.ndarray) -> None:
        """Count the samples of an index, INDEX."""
        tokens = index["tokens"]
        self.samples += len(index)
        self.tokens += int(tokens.sum())
        self.learned_tokens += int((tokens - index["context"] - 1).sum())
        self.longest = max(self.longest, int(tokens.max(initial=0)))
        found = zip(*(part.tolist() for part in np.unique(tokens, return_counts=True)), strict=True)
        for length, number in found:
            self.lengths[length] = self.lengths.get(length, 0) + number

    def merge(self, other: "Counts") -> None:
        """Add those of another shard."""
        for name in vars(self).keys() - {"longest", "lengths"}:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        for tokens, number in other.lengths.items():
            self.lengths[tokens] = self.lengths.get(tokens, 0) + number

    def as_json(self) -> dict[str, Any]:
        """Lengths in their order, as pairs."""
        return {**vars(self), "lengths": sorted(self.lengths.items())}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Counts":
        """The inverse of `as_json`."""
        return cls(**{**content, "lengths": dict(map(tuple, content["lengths"]))})


def file_crc(path: str) -> int:
    """The CRC-32C of a file."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            crc = google_crc32c.extend(crc, chunk)
    return crc


def _masked(crc: Any) -> Any:
    """A CRC-32C, or a uint64 array of them, masked as in TensorFlow's core/lib/hash/crc32c.h."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _masked_crc(data: bytes) -> int:
    return _masked(google_crc32c.value(data))


@lru_cache(maxsize=65536)
def _record_header(length: int) -> bytes:
    number = struct.pack("<Q", length)
    return number + _UINT32.pack(_masked_crc(number))


class ShardWriter:
    """Appends samples to one shard file, and remembers its index; a context manager."""

    def __init__(self, path: str, *, backend: Backend, file: int = 0):
        self.path, self.file = path, file
        self._offsets, self._tokens = array("Q"), array("I")
        self._contexts, self._cuts = array("I"), array("B")
        self._target = _RecordTarget(path) if backend == "record" else _LmdbTarget(path)

    def write(self, sample: Sample) -> None:
        """Append a sample."""
        cuts = sample.prompt_cut + 2 * sample.answer_cut
        self.write_ids([sample.context_length], [sample.input_ids.tobytes()], cuts)

    def write_ids(self, context_lengths: list[int], ids: list[bytes], cuts: int = 0) -> None:
        """Append samples, all cut alike, by the bytes of their int32 ids."""
        packed = map(_INT32.pack, context_lengths)
        self._offsets.extend(self._target.write(list(map(operator.add, packed, ids))))
        self._tokens.extend(len(one) // _IDS.itemsize for one in ids)
        self._contexts.extend(context_lengths)
        self._cuts.extend([cuts] * len(ids))

    def index(self) -> np.ndarray:
        """The rows of the samples written so far, INDEX."""
        index = np.zeros(len(self._offsets), dtype=INDEX)
        index["offset"], index["tokens"] = self._offsets, self._tokens
        index["context"], index["cuts"], index["file"] = self._contexts, self._cuts, self.file
        return index

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        self._target.close()


class _RecordTarget:
    def __init__(self, path: str):
        self.file, self.offset = open(path, "wb", buffering=1 << 20), 0  # noqa: SIM115

    def write(self, all_data: list[bytes]) -> list[int]:
        """The records' offsets."""
        crcs = np.fromiter(map(google_crc32c.value, all_data), np.uint64, len(all_data))
        footers = _masked(crcs).astype("<u4").tobytes()
        offsets: list[int] = []
        records: list[bytes] = []
        for number, data in enumerate(all_data):
            footer = footers[number * FOOTER : (number + 1) * FOOTER]
            records += (_record_header(len(data)), data, footer)
            offsets.append(self.offset)
            self.offset += HEADER + len(data) + FOOTER
        self.file.write(b"".join(records))
        return offsets

    def close(self) -> None:
        self.file.close()


class _LmdbTarget:
    """One transaction, keys in ascending order: pages are filled and the file has no gaps."""

    def __init__(self, path: str):
        self.number = 0
        self.environment = lmdb.open(
            path, subdir=False, map_size=1 << 40, lock=False, sync=False, meminit=True
        )
        self.transaction = self.environment.begin(write=True)
        self.cursor = self.transaction.cursor()

    def write(self, all_data: list[bytes]) -> list[int]:
        """The entries' numbers."""
        numbers = list(range(self.number, self.number + len(all_data)))
        self.number += len(all_data)
        entries = [(number.to_bytes(4, "big"), data + _UINT32.pack(google_crc32c.value(data)))
                   for number, data in zip(numbers, all_data, strict=True)]  # fmt: skip
        try:
            self.cursor.putmulti(entries, append=True)
        except lmdb.Error as error:
            raise OSError(str(error)) from error
        return numbers

    def close(self) -> None:
        try:
            self.transaction.commit()
            self.environment.sync(True)
        except lmdb.Error as error:
            raise OSError(str(error)) from error
        finally:
            self.environment.close()


class _RecordSource:
    def __init__(self, path: str):
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, offset: int, tokens: int) -> bytes | None:
        """The data of the sample, or None where it is damaged."""
        start, length = offset + HEADER, 4 * (tokens + 1)
        stop = start + length
        if self.map[offset:start] != _record_header(length):
            return None
        data, (crc,) = self.map[start:stop], _UINT32.unpack_from(self.map, stop)
        return data if crc == _masked(google_crc32c.value(data)) else None


class _LmdbSource:
    def __init__(self, path: str):
        environment = lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False)
        self.transaction = environment.begin(buffers=False)

    def read(self, offset: int, tokens: int) -> bytes | None:
        """The data of the sample and its CRC, or None where it is damaged."""
        stored = self.transaction.get(offset.to_bytes(4, "big"))
        if stored is None or len(stored) != 4 * (tokens + 1) + FOOTER:
            return None
        return stored if google_crc32c.value(stored) == CRC_OF_SOUND else None


def _allow_open_files(number: int) -> None:
    """A shard that is read keeps its file open, and most systems allow 1024 unless asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + number if hard == resource.RLIM_INFINITY else min(soft + number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def manifest_path(folder: str) -> str:
    """Where the manifest of a folder of records stands."""
    return os.path.join(folder, "manifest.json")


def read_manifest(folder: str) -> dict[str, Any]:
    """The manifest of a folder of records.

    Raises:
        ToolkitError: if it is missing or not a manifest.
    """
    if not os.path.exists(manifest_path(folder)):
        raise ToolkitError(f"{folder}: not built yet; run: python data_utils.py")
    manifest = read_json(manifest_path(folder))
    if not {"source", "files", "counts", "shards", "backend", "index_crc"} <= manifest.keys():
        raise ToolkitError(f"{manifest_path(folder)}: not a manifest; run: python data_utils.py")
    return manifest


class RecordFolder:
    """Random access to the samples of a folder of records, over all its shards.

    A shard is opened at its first sample; nothing is loaded. LMDB trusts what it reads: a damaged
    page can give it wrong data or end the process, so an LMDB shard is read through for its CRC.

    Raises:
        ToolkitError: if a file is missing or has another size than when it was built, or the index
            another CRC.
    """

    def __init__(self, folder: str):
        self.path, self.manifest = folder, read_manifest(folder)
        self.shards = self.manifest["shards"]
        self._check_size("index.npy", self.manifest["index_bytes"])
        self._check_crc("index.npy", self.manifest["index_crc"])
        for shard in self.shards:
            self._check_size(shard["name"], shard["bytes"])
        self.index = np.load(os.path.join(folder, "index.npy"), mmap_mode="r")
        self._rows = memoryview(self.index.view(np.uint8))  # a row of a memmap takes a microsecond
        self.starts = list(itertools.accumulate((s["samples"] for s in self.shards), initial=0))
        self._sources: dict[int, _RecordSource | _LmdbSource] = {}
        _allow_open_files(len(self.shards))

    def _check_size(self, name: str, expected: int) -> None:
        path = os.path.join(self.path, name)
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size != expected:
            raise ToolkitError(
                f"{path}: {size:,} bytes of {expected:,}: cut short or changed;"
                f" {BUILD.format(folder=self.path)}"
            )

    def _check_crc(self, name: str, expected: int) -> None:
        path = os.path.join(self.path, name)
        if file_crc(path) != expected:
            raise ToolkitError(f"{path}: damaged; {BUILD.format(folder=self.path)}")

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, number: int) -> Sample:
        """A sample.

        Raises:
            IndexError: beyond the last one.
            ToolkitError: if it is damaged, with shard and offset.
        """
        if not 0 <= number < self.starts[-1]:
            raise IndexError(number)
        shard = bisect.bisect_right(self.starts, number) - 1
        offset, tokens, context, _, cuts = _ROW.unpack_from(self._rows, number * _ROW.size)
        source = self._sources.get(shard) or self._open(shard)
        try:
            data = source.read(offset, tokens)
        except (lmdb.Error, struct.error):  # it was changed after it was opened
            data = None
        if data is None or _INT32.unpack_from(data)[0] != context:
            name = os.path.join(self.path, self.shards[shard]["name"])
            raise ToolkitError(
                f"{name}: sample {number} at {offset} is damaged; {BUILD.format(folder=self.path)}"
            )
        ids = np.frombuffer(data, _IDS, tokens, _INT32.size)
        if not cuts:
            return Sample(ids, context)
        return Sample(ids, context, bool(cuts & 1), bool(cuts & 2))

    def _open(self, shard: int) -> _RecordSource | _LmdbSource:
        name, is_lmdb = self.shards[shard]["name"], self.manifest["backend"] == "lmdb"
        path = os.path.join(self.path, name)
        try:
            if is_lmdb:
                self._check_crc(name, self.shards[shard]["crc"])
            self._sources[shard] = _LmdbSource(path) if is_lmdb else _RecordSource(path)
        except (lmdb.Error, OSError, ValueError) as error:
            raise ToolkitError(f"{path}: cannot be opened ({error})") from None
        return self._sources[shard]

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of every sample, and how many of them are learned; two int64 arrays."""
        tokens = self.index["tokens"].astype(np.int64)
        return tokens, tokens - self.index["context"] - 1

    def verify(self) -> Iterator[int]:
        """Read every sample, for its CRC; gives their numbers, for a progress bar.

        Raises:
            ToolkitError: at the first damaged one.
        """
        for number in range(len(self)):
            self[number]
            yield number
