"""Files and folders written whole or not at all; JSON objects read with one line of complaint."""

import contextlib
import json
import os
import pathlib
import shutil
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


def replace_folder(new: str, folder: str) -> None:
    """Put a finished folder in the place of an older one, which stands until then."""
    old = f"{os.path.normpath(folder)}.old"
    if os.path.exists(folder):
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: str) -> None:
    """Mend what a kill inside `replace_folder` left: the older folder stands again, or is gone."""
    old = f"{os.path.normpath(folder)}.old"
    if os.path.isdir(old) and not os.path.exists(folder):
        with contextlib.suppress(FileNotFoundError):  # another process of the run was quicker
            os.replace(old, folder)
            print(f"{folder}: its replacement was cut off; the one saved before it is back")
