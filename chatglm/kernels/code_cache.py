"""Compiled kernels on disk, under a hash of all that went into them: compiled once a machine."""

import functools
import hashlib
import logging
import os
import pathlib

logger = logging.getLogger("chatglm")

FOLDER = "~/.cache/chatglm-6b/kernels"


def cached_path(name: str, suffix: str, key: object) -> pathlib.Path:
    """Where the code of a kernel stands once it is compiled; key: all that it depends on."""
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
    folder = pathlib.Path(os.environ.get("CHATGLM_KERNEL_CACHE", FOLDER)).expanduser()
    return folder / f"{name}-{digest}{suffix}"


def keep(path: pathlib.Path, code: bytes) -> None:
    """Write the code, aside and then renamed; where that can't be, it is said once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_bytes(code)
        aside.replace(path)
    except OSError as error:
        _say_once(str(path.parent), error.strerror)


@functools.cache
def _say_once(folder: str, reason: str | None) -> None:
    logger.warning(
        "%s: compiled kernels can't be kept there (%s), so that every start compiles them anew;"
        " CHATGLM_KERNEL_CACHE names another folder", folder, reason,
    )  # fmt: skip
