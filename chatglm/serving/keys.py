"""API keys, from a file or the environment; they are never printed."""

import re
from collections.abc import Mapping

from ..errors import ToolkitError

VARIABLE = "CHATGLM_API_KEYS"
COMMENT = re.compile(r"(?:^|\s)#")  # a key may hold the sign


def read_keys(path: str | None, environ: Mapping[str, str]) -> list[str]:
    """The keys of a file (one a line, # begins a comment) and of the environment (by commas).

    Raises:
        ToolkitError: if the file can't be read or holds none, or a key is no plain ASCII word.
    """
    keys = [key.strip() for key in environ.get(VARIABLE, "").split(",") if key.strip()]
    if path is not None:
        try:
            with open(path, encoding="utf-8") as file:
                lines = [COMMENT.split(line)[0].strip() for line in file]
        except (OSError, UnicodeDecodeError) as error:
            raise ToolkitError(f"api_keys_file {path}: cannot be read ({error})") from None
        found = [line for line in lines if line]
        if not found:
            raise ToolkitError(f"api_keys_file {path} holds no key: write one a line")
        keys += found
    for number, key in enumerate(keys, start=1):
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ToolkitError(f"API key number {number}: only printable ASCII without spaces")
    return keys
