"""Files of records, read with flat memory, and the line at which each record starts.

    .json                 one JSON object a line, or one JSON array of objects
    .jsonl                one JSON object a line
    .json.gz, .jsonl.gz   the same, compressed
    .parquet              one record a row; the row's number stands in for the line

Lines and rows are counted from 1. What is held at a time is one record and a few MiB; of parquet,
a row group as it is compressed, and a thousand rows. What is wrong with one record is a BadRecord,
to be counted or raised by whoever reads; what makes the rest of a file unreadable is a
ToolkitError.
"""

import codecs
import contextlib
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import orjson

from .errors import ToolkitError
from .formats import SHAPES, BadRecord, recognise

CHUNK_BYTES = 1 << 20
ROWS_AT_ONCE = 1000
RECORDS_LOOKED_AT = 100
DAMAGE = (OSError, EOFError, zlib.error)  # gzip raises all three

_KINDS = {
    ".json": "json",
    ".json.gz": "json",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
}
_WHITE = re.compile(r"[ \t\r\n]*")
# Only the ends of values are wanted of it: numbers are left as they stand, however long.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)
_LONGEST_WORD = len("-Infinity")


def kind_of_file(path: str) -> str:
    """json, jsonl or parquet, by the name's end.

    Raises:
        ToolkitError: for any other name.
    """
    for ending, kind in _KINDS.items():
        if path.lower().endswith(ending):
            return kind
    raise ToolkitError(f"{path}: the name must end in one of {', '.join(_KINDS)}")


def read_objects(path: str) -> Iterator[tuple[int, Any]]:
    """Each record of a file of any kind, parsed, with its line; a BadRecord where it can't be.

    Raises:
        ToolkitError: where the file can't be read on.
    """
    if kind_of_file(path) == "parquet":
        for group in range(parquet_groups(path)):
            yield from read_parquet(path, group)
        return
    for line, raw in read_raw(path):
        try:
            yield line, parse_json(raw)
        except BadRecord as bad:
            yield line, bad


def parse_json(raw: bytes) -> Any:
    """The content of a record as read_raw gives it.

    Raises:
        BadRecord: if it isn't JSON in UTF-8; NaN and numbers beyond a double's range are not.
    """
    try:
        return orjson.loads(raw.removeprefix(codecs.BOM_UTF8))
    except orjson.JSONDecodeError as error:
        raise BadRecord(f"not a JSON object in UTF-8 ({error})") from None


def read_raw(path: str) -> Iterator[tuple[int, bytes]]:
    """(line, bytes) of each record of a file that is not parquet; blank lines are left out.

    Raises:
        ToolkitError: where the file can't be read on: it is damaged or cut off, or an array is no
            JSON from there, which leaves unknown where its next element starts.
    """
    line, as_array = 0, is_array(path)
    with open_file(path) as file:
        try:
            for line, raw in _Window(file, path).elements() if as_array else read_lines(file):
                yield line, raw
        except DAMAGE as error:
            raise _unreadable(path, line, error) from None


def _unreadable(path: str, line: int, error: Exception) -> ToolkitError:
    return ToolkitError(f"{path}: cannot be read beyond line {line} ({error}); is the file whole?")


def is_array(path: str) -> bool:
    """Whether a file is one JSON array, and not an object a line."""
    if kind_of_file(path) != "json":
        return False
    with open_file(path) as file:
        try:
            return _Window(file, path).next_character() == "["
        except DAMAGE as error:
            raise _unreadable(path, 0, error) from None


def open_file(path: str) -> io.BufferedReader:
    """A file to read, uncompressed.

    Raises:
        ToolkitError: if it can't be opened.
    """
    try:
        packed = path.lower().endswith(".gz")
        raw = gzip.open(path, "rb") if packed else open(path, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise ToolkitError(f"{path}: cannot be read ({error.strerror})") from None
    return io.BufferedReader(raw, CHUNK_BYTES)


def read_lines(file: Iterable[bytes], *, first: int = 1) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers; `first` is the first one's."""
    for number, line in enumerate(file, start=first):
        blank = line.isspace() or (line[:1] == codecs.BOM_UTF8[:1] and _is_bare_mark(line))
        if not blank:
            yield number, line


def _is_bare_mark(line: bytes) -> bool:
    return not line.removeprefix(codecs.BOM_UTF8).strip()


class _Window:
    """The part of a file that is being read, as Latin-1: a character a byte, none of them wrong.

    JSON's own marks are ASCII, so that the ends of elements are found whatever stands in texts.
    """

    def __init__(self, file: io.BufferedReader, path: str):
        self._file, self._path = file, path
        start = file.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
        self._text, self._position, self._line = start.decode("latin-1"), 0, 1

    def next_character(self) -> str:
        """The next one that isn't white space, not taken; empty at the file's end."""
        while True:
            self._move(_WHITE.match(self._text, self._position).end())  # type: ignore[union-attr]
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_on():
                return ""

    def elements(self) -> Iterator[tuple[int, bytes]]:
        """(line at which it starts, bytes) of each element of the array that the file is."""
        self._take("[")
        if self.next_character() == "]":
            self._take("]")
        else:
            yield self._element()
            while self._take(",]") == ",":
                yield self._element()
        if self.next_character():
            self._refuse("something follows the array's ]", self._position)

    def _take(self, allowed: str) -> str:
        found = self.next_character()
        if not found:
            self._refuse("the file ends inside the array", self._position)
        if found not in allowed:
            self._refuse(f"expected {' or '.join(allowed)} here", self._position)
        self._position += 1
        return found

    def _element(self) -> tuple[int, bytes]:
        if not self.next_character():
            self._refuse("the file ends inside the array", self._position)
        end = self._end_of_value()
        line, raw = self._line, self._text[self._position : end].encode("latin-1")
        self._move(end)
        return line, raw

    def _end_of_value(self) -> int:
        while True:
            try:
                _, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if not self._may_be_cut_off(error) or not self._read_on():
                    self._refuse(error.msg, error.pos)
            except RecursionError:
                self._refuse("nested too deep", self._position)
            else:  # a number may go on behind the window
                if end < len(self._text) or not self._read_on():
                    return end

    def _may_be_cut_off(self, error: json.JSONDecodeError) -> bool:
        """Whether the window's end may be what is wrong, so that a broken file isn't read whole."""
        near_the_end = error.pos >= len(self._text.rstrip()) - _LONGEST_WORD
        return near_the_end or error.msg.startswith("Unterminated string")

    def _read_on(self) -> bool:
        """Let go of what was read, and double what is left, so that long elements are read fast.

        False, and nothing is changed, if the file has ended.
        """
        left = self._text[self._position :]
        more = self._file.read(max(CHUNK_BYTES, len(left)))
        if more:
            self._text, self._position = left + more.decode("latin-1"), 0
        return bool(more)

    def _move(self, position: int) -> None:
        self._line += self._text.count("\n", self._position, position)
        self._position = position

    def _refuse(self, reason: str, position: int) -> NoReturn:
        self._move(position)
        raise ToolkitError(
            f"{self._path}:{self._line}: not JSON ({reason}), so that the rest of the array cannot"
            " be read; mend it, or write one object a line"
        )


def parquet_groups(path: str) -> int:
    """How many row groups a parquet file has.

    Raises:
        ToolkitError: if it can't be read, or pyarrow is missing.
    """
    with _parquet_file(path) as file:
        return file.num_row_groups


def read_parquet(path: str, group: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row's number in the whole file, row) of each row of one row group.

    Raises:
        ToolkitError: where the file can't be read on, or if pyarrow is missing.
    """
    with _parquet_file(path) as file:
        before = sum(file.metadata.row_group(index).num_rows for index in range(group))
        batches = file.iter_batches(ROWS_AT_ONCE, row_groups=[group], use_threads=False)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from enumerate(rows, start=before + 1)


@contextlib.contextmanager
def _parquet_file(path: str) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ToolkitError(f"{path}: parquet needs pyarrow; run: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise ToolkitError(f"{path}: cannot be read as parquet ({reason})") from None


def file_format(path: str, wanted: str) -> str:
    """The format wanted; for auto the one that the first records have by their keys.

    Raises:
        ToolkitError: for auto, if they have none of the known ones, or several.
    """
    if wanted != "auto":
        return wanted
    records = (content for _, content in read_objects(path) if isinstance(content, dict))
    looked_at = list(itertools.islice(records, RECORDS_LOOKED_AT))
    found = sorted({form for form in map(recognise, looked_at) if form})
    if len(found) == 1:
        return found[0]
    if found:
        raise ToolkitError(
            f"{path}: records of several formats ({', '.join(found)}); write a file for each"
        )
    known = "; ".join(f"{form} {shape}" for form, shape in SHAPES.items())
    raise ToolkitError(
        f"{path}: its first records are in no known format ({_keys_of(looked_at)}); known: {known}"
    )


def _keys_of(records: list[dict[str, Any]]) -> str:
    if not records:
        return "no JSON object"
    keys = list(dict.fromkeys(key for record in records for key in record))
    return f"keys: {', '.join(repr(key[:40]) for key in keys[:10])}"
