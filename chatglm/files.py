"""Text files: written whole or not at all, and JSON objects read with one line of complaint."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, TextIO

from .errors import ToolkitError


@contextlib.contextmanager
def written_aside(path: str) -> Iterator[TextIO]:
    """A text file that takes its place when it is whole.

    Raises:
        ToolkitError: before anything else is done, if it can't be written there.
    """
    aside = f"{path}.part"
    if os.path.isdir(path):
        raise ToolkitError(f"{path}: a folder; name a file")
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = open(aside, "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise ToolkitError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        with file:
            yield file
        os.replace(aside, path)
    finally:
        pathlib.Path(aside).unlink(missing_ok=True)


def read_json(path: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ToolkitError: if the file can't be read, or holds something else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise ToolkitError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ToolkitError(f"{path}: expected a JSON object")
    return content
