"""What a folder holds, by its files: weights, virtual tokens alone, or an adapter.

Apart from checkpoints.py, which writes them: a chat need not wait for what training imports.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from .errors import ToolkitError
from .files import read_json, recover_folder
from .model import ChatGLMForConditionalGeneration
from .tuning import ADAPTER_CONFIG
from .tuning.prompt import PREFIX, add_prefix
from .weights import UNREADABLE, weight_files

PREFIX_FILE = "prefix_encoder.safetensors"
Kind = Literal["weights", "prefix", "adapter"]


def kind_of(folder: str) -> Kind:
    """What a folder holds: weights, a prefix encoder alone, or a PEFT adapter.

    The released p-tuning code saves its encoder as a pytorch_model.bin of that alone.

    Raises:
        ToolkitError: if there is no such folder, or none of these in it.
    """
    recover_folder(folder)
    if not os.path.isdir(folder):
        raise ToolkitError(f"{folder}: no such folder; train first: python train.py")
    if os.path.exists(os.path.join(folder, ADAPTER_CONFIG)):
        return "adapter"
    if os.path.exists(os.path.join(folder, PREFIX_FILE)):
        return "prefix"
    files = weight_files(folder)
    if not files:
        raise ToolkitError(
            f"{folder}: neither weights (model.safetensors, pytorch_model.bin), nor a prefix"
            f" encoder ({PREFIX_FILE}), nor an adapter ({ADAPTER_CONFIG})"
        )
    names = [name for path in files for name in _tensor_names(path)] if len(files) == 1 else [""]
    return "prefix" if all(name.startswith(PREFIX) for name in names) else "weights"


def _tensor_names(path: str) -> list[str]:
    with readable(path):
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        return list(torch.load(path, map_location="meta", weights_only=True, mmap=True))


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """A damaged file is one line."""
    try:
        yield
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise ToolkitError(f"{path}: can't be read ({reason}); the file is damaged") from None


def load_prefix(model: ChatGLMForConditionalGeneration, folder: str) -> None:
    """Give a model the prefix encoder in a folder, ours or the released code's."""
    path = os.path.join(folder, PREFIX_FILE)
    if not os.path.exists(path):
        (path,) = weight_files(folder)
    with readable(path):
        if path.endswith(".safetensors"):
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    add_prefix(model, state, path)


def read_settings_json(folder: str) -> dict[str, Any]:
    """The settings.json that a training run saved, or {} if there is none.

    Raises:
        ToolkitError: if it is not JSON.
    """
    path = os.path.join(folder, "settings.json")
    if not os.path.exists(path):
        return {}
    return read_json(path)
