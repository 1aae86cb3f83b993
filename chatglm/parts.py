"""Files of records cut into parts, each of which another process can read by itself.

Lines      a stretch of an uncompressed file of lines: only its place is passed on
RowGroup   of a parquet file, likewise
Records    the records themselves, of files that can only be read from their beginning: gzip
           and JSON arrays
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .errors import ToolkitError
from .sources import (
    is_array,
    kind_of_file,
    open_file,
    parquet_groups,
    read_lines,
    read_parquet,
    read_raw,
)


@dataclass(frozen=True)
class Lines:
    """The bytes from start to stop, whole lines; `first` is the number of the first one."""

    start: int
    stop: int
    first: int

    def read(self, path: str) -> Iterator[tuple[int, bytes]]:
        """(line, bytes) of each record."""
        try:
            with open_file(path) as file:
                file.seek(self.start)
                text = file.read(self.stop - self.start)
        except OSError as error:
            raise ToolkitError(f"{path}: cannot be read ({error})") from None
        yield from read_lines(io.BytesIO(text), first=self.first)


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file."""

    number: int

    def read(self, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, row) of each record."""
        yield from read_parquet(path, self.number)


@dataclass(frozen=True)
class Records:
    """Records with their lines, as they stand in the file."""

    records: list[tuple[int, bytes]]

    def read(self, path: str) -> Iterator[tuple[int, bytes]]:
        """(line, bytes) of each record; the file is not read again."""
        yield from self.records


Part = Lines | RowGroup | Records


def split(path: str, size: int) -> Iterator[Part]:
    """The parts of a file, in order, of about `size` bytes of records.

    Raises:
        ToolkitError: where the file can't be read on.
    """
    if kind_of_file(path) == "parquet":
        yield from map(RowGroup, range(parquet_groups(path)))
    elif path.lower().endswith(".gz") or is_array(path):
        yield from _split_records(path, size)
    else:
        yield from _split_lines(path, size)


def _split_lines(path: str, size: int) -> Iterator[Lines]:
    start, first = 0, 1
    with open_file(path) as file:
        while text := file.read(size):
            rest = b"" if text.endswith(b"\n") else file.readline()
            stop = start + len(text) + len(rest)
            yield Lines(start, stop, first)
            start, first = stop, first + text.count(b"\n") + rest.count(b"\n")


def _split_records(path: str, size: int) -> Iterator[Records]:
    records: list[tuple[int, bytes]] = []
    held = 0
    for line, raw in read_raw(path):
        records.append((line, raw))
        held += len(raw)
        if held >= size:
            yield Records(records)
            records, held = [], 0
    if records:
        yield Records(records)
