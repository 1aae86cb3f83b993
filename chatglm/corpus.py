"""Paragraphs from files, and the token ids that their rounds make.

Training's records and the evaluation take their texts from here, so that a model is scored on what
it was trained to read.
"""

import glob
import os
from collections.abc import Iterator, Sequence

from .errors import ToolkitError
from .formats import BadRecord, Rounds, parse_record
from .pieces import Pieces
from .prompts import build_prompt
from .sources import file_format, read_objects


def expand_files(patterns: list[str]) -> list[str]:
    """The files that names and globs stand for, each pattern's sorted.

    Raises:
        ToolkitError: if a pattern matches nothing.
    """
    files = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern))
        if not found:
            raise ToolkitError(
                f"{pattern}: no such file; check train_file, mix_file, eval_file and test_file"
            )
        for path in found:
            if not os.path.isfile(path):
                raise ToolkitError(
                    f"{path}: a folder; name files, or a pattern such as {path}/*.json"
                )
        files.extend(found)
    return files


def count_files(entries: list[str]) -> list[int]:
    """How many files each entry of train_file stands for, when each entry has a weight.

    Raises:
        ToolkitError: if two entries match the same file, whatever they call it.
    """
    counts: list[int] = []
    matched_by: dict[str, int] = {}
    for number, entry in enumerate(entries):
        files = expand_files([entry])
        for path in files:
            first = matched_by.setdefault(os.path.realpath(path), number)
            if first != number:
                raise ToolkitError(
                    f"{path} is matched by two entries of train_file, {entries[first]} and {entry}:"
                    " with train_file_weights a file belongs to one"
                )
        counts.append(len(files))
    return counts


def read_paragraphs(
    files: list[str], *, data_format: str = "auto", skip_bad: bool = False
) -> Iterator[Rounds]:
    """The rounds of each record, as (question, answer) pairs.

    Raises:
        ToolkitError: at the first bad record, with file, line and reason, unless they are skipped,
            because the building of records counts them.
    """
    for path in files:
        for line, rounds in read_rounds(path, data_format):
            if not isinstance(rounds, BadRecord):
                yield rounds
            elif not skip_bad:
                raise ToolkitError(f"{path}:{line}: {rounds}")


def read_rounds(path: str, data_format: str) -> Iterator[tuple[int, Rounds | BadRecord]]:
    """The line of each record of a file, and its rounds, or what is wrong with it."""
    form = file_format(path, data_format)
    for line, content in read_objects(path):
        try:
            yield line, parse_record(content, form)
        except BadRecord as bad:
            yield line, bad


def encode_rounds(
    paragraphs: Sequence[Rounds], pieces: Pieces
) -> Iterator[tuple[str, bytes, bytes]]:
    """Of every round in order: its prompt, and the ids of prompt and answer, bytes of int32.

    The earlier rounds of the paragraph stand in the prompt. All texts are tokenised in one call.
    """
    prompts = [build_prompt(q, rounds[:i]) for rounds in paragraphs
               for i, (q, _) in enumerate(rounds)]  # fmt: skip
    answers = [answer for rounds in paragraphs for _, answer in rounds]
    encoded = pieces.encode_bytes([*prompts, *answers])
    yield from zip(prompts, encoded[: len(prompts)], encoded[len(prompts) :], strict=True)
