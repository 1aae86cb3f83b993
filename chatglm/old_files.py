"""Checkpoints as DeepSpeed, Lightning and the Hugging Face Trainer write them, read as tensors.

They are pickles that name classes of their writers' code. Every name that torch does not know is
stood in for by an empty object: no code of a file runs, and what it names need not be installed.
The obvious other way, DeepSpeed's own zero_to_fp32, runs whatever a file names, and puts all
weights and Adam's moments into memory in fp32.
"""

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .errors import ToolkitError
from .files import read_json
from .weights import UNREADABLE, weight_files

ADAPTER_CONFIG = "adapter_config.json"
MODEL_FILE = "mp_rank_00_model_states.pt"
SHARDS = "zero_pp_rank_*_mp_rank_00_model_states.pt"
FP32_SHARDS = "*zero_pp_rank_*_mp_rank_00_optim_states.pt"
RESUME_STATE = "state.ckpt"
_PARENTS = 2
"""A DeepSpeed folder lies so deep in the checkpoint that has its configs: .ckpt/checkpoint/."""


@dataclass(frozen=True)
class OldCheckpoint:
    """What was found."""

    where: str
    """The file, or the folder of DeepSpeed's files."""
    kind: str
    """Who writes such, in words."""
    state: dict[str, Tensor]
    """The tensors by their names there, on the CPU, mapped from the files where that goes."""
    rest: dict[str, Any]
    """Whatever else the file holds; stand-ins where it names unknown classes."""
    adapter_config: dict[str, Any]
    """PEFT's adapter_config.json beside it, or {}."""
    run: dict[str, Any]
    """Settings of our own run that was cut off, or {}."""


def read_old(path: str, *, trust_pickle: bool = False) -> OldCheckpoint:
    """The checkpoint in a file or folder.

    trust_pickle: unpickle what can't be read without running code that the file names.

    Raises:
        ToolkitError: if there is none, parts of it are missing, or it can't be read so.
    """
    where = _find(os.path.expanduser(path))

    def load(file: str) -> dict[str, Any]:
        return _load(file, trust_pickle=trust_pickle)

    rest: dict[str, Any] = {}
    if where.endswith(".safetensors"):
        kind, state = "weights", _load_safetensors(where)
    elif os.path.isfile(where):
        kind, state, rest = _read_file(where, load)
    elif os.path.exists(os.path.join(where, MODEL_FILE)):
        _, state, rest = _read_file(os.path.join(where, MODEL_FILE), load)
        kind = "DeepSpeed, weights whole"
    else:
        try:
            kind, state, rest = _join_shards(where, load)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ToolkitError(
                f"{where}: not as DeepSpeed's ZeRO-3 writes it ({error!r})"
            ) from None
    if not state:
        raise ToolkitError(f"{where}: holds no tensors")
    run = _json_beside(where, "run.json").get("settings", {})
    return OldCheckpoint(where, kind, state, rest, _json_beside(where, ADAPTER_CONFIG), run)


def _find(path: str) -> str:
    """The file, or the folder of DeepSpeed's files, that a path means."""
    if os.path.exists(os.path.join(path, RESUME_STATE)):
        path = os.path.join(path, RESUME_STATE)
    if os.path.isfile(path):
        inside = path.endswith(("_model_states.pt", "_optim_states.pt"))
        return os.path.dirname(path) or "." if inside else path
    if not os.path.isdir(path):
        raise ToolkitError(f"{path}: no such file or folder")
    for folder in (path, os.path.join(path, "checkpoint"), _latest(path)):
        if folder and (Path(folder, MODEL_FILE).exists() or any(Path(folder).glob(SHARDS))):
            _refuse_tensor_parallel(folder)
            return folder
    raise ToolkitError(f"{path}: {_why_nothing(path)}")


def _latest(folder: str) -> str:
    """The folder that DeepSpeed's file `latest` names, or ""."""
    pointer = Path(folder, "latest")
    if not pointer.is_file():
        return ""
    named = os.path.join(folder, pointer.read_text(encoding="utf-8", errors="replace").strip())
    if not os.path.isdir(named):
        raise ToolkitError(f"{pointer} names {named}, which does not exist")
    return named


def _refuse_tensor_parallel(folder: str) -> None:
    ranks = {m[1] for f in os.listdir(folder) if (m := re.search(r"mp_rank_(\d+)_model_states", f))}
    if len(ranks) > 1:
        raise ToolkitError(
            f"{folder}: split over {len(ranks)} tensor-parallel ranks (mp_rank_00 and on), which"
            " can't be joined here: join them with the code that trained it"
        )


def _why_nothing(folder: str) -> str:
    if weight_files(folder) or os.path.exists(os.path.join(folder, ADAPTER_CONFIG)):
        return (
            "weights or an adapter as they lie: infer_finetuning.py and infer_lora_finetuning.py"
            " read such a folder; if they refuse its names, give the file itself"
        )
    inside = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() or entry.name.endswith((".ckpt", ".bin", ".pt", ".safetensors"))
    )
    hint = f"; give one of what is in it: {', '.join(inside[:6])}" if inside else ""
    return f"no {MODEL_FILE}, {SHARDS}, nor a file `latest` that names a folder with them{hint}"


def _json_beside(where: str, name: str) -> dict[str, Any]:
    """A JSON file in the folder or up to two above, or {}."""
    folder = Path(where).absolute()
    for parent in ([] if folder.is_file() else [folder]) + list(folder.parents)[:_PARENTS]:
        path = parent / name
        if path.is_file():
            return read_json(str(path))
    return {}


# One file.


def _read_file(path: str, load: Callable) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    content = load(path)
    known = {"module": "DeepSpeed, weights whole", "state_dict": "Lightning"}
    key = next((key for key in known if isinstance(content.get(key), dict)), "")
    state = content[key] if key else content
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            hint = "" if key else f"; expected one of {', '.join(known)}, or tensors only"
            raise ToolkitError(f"{path}: {name} is no tensor but {type(tensor).__name__}{hint}")
    rest = {name: value for name, value in content.items() if name != key} if key else {}
    return known.get(key, "weights"), dict(state), rest


def _load_safetensors(path: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except UNREADABLE as error:
        raise ToolkitError(f"{path}: can't be read ({_brief(error)}); it is damaged") from None


class Unknown:
    """In the place of an object of an unknown class: it keeps the state and does nothing."""

    def __new__(cls, *args):
        made = super().__new__(cls)
        made.state = args
        return made

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.state = state


class UnknownDict:
    """In the place of an unknown kind of dict."""

    def __new__(cls, *args):
        return OrderedDict()


def _load(path: str, *, trust_pickle: bool) -> dict[str, Any]:
    """The dict in a pickle of torch.save, with stand-ins for all that torch does not know."""
    try:
        if not _is_pickle(path):
            raise EOFError("neither a whole zip file of torch.save nor its older format")
        content = _load_safely(path)
    except (OSError, EOFError, RuntimeError) as error:
        raise ToolkitError(f"{path}: can't be read ({_brief(error)}); it may be damaged") from None
    except (pickle.UnpicklingError, ValueError, TypeError, AttributeError, LookupError) as error:
        if not trust_pickle:
            raise ToolkitError(
                f"{path}: can't be read without running code that it names ({_brief(error)}): if"
                " you trust who wrote it, add --trust_pickle true"
            ) from None
        print(f"{path}: unpickled with all the code that it names, as trust_pickle says"
              f" ({_brief(error)})")  # fmt: skip
        content = _load_trusted(path)
    if not isinstance(content, dict):
        raise ToolkitError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    return content


def _load_safely(path: str) -> Any:
    if not zipfile.is_zipfile(path):  # the format of torch before 1.6
        return torch.load(path, map_location="cpu", weights_only=True)
    stand_ins: list[Any] = [
        (UnknownDict if name.lower().endswith("dict") else Unknown, name)
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)
    ]
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _load_trusted(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (*UNREADABLE, ImportError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ToolkitError(
            f"{path}: can't be unpickled ({_brief(error)}); if it lacks a package, install that"
        ) from None


def _is_pickle(path: str) -> bool:
    with open(path, "rb") as file:
        return zipfile.is_zipfile(path) or file.read(1) == b"\x80"


def _brief(error: Exception) -> str:
    """What is wrong, out of torch's page of advice."""
    text = str(error).partition("\n\nCheck the documentation")[0].partition(" Please use")[0]
    return " ".join(re.split(r"\n\n|error: ", text)[-1].split())[:200]


# ZeRO-3.


def _join_shards(folder: str, load: Callable) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Every parameter out of its ranks' parts, in the precision that the model computed in.

    A parameter is cut into equal parts, the last one padded. The trained ones lie one after the
    other in fp32 in the optimizer's flat groups; frozen ones lie by name beside the model.
    """
    models = [load(path) for path in _by_rank(folder, SHARDS)]
    optimizers = [load(path)["optimizer_state_dict"] for path in _by_rank(folder, FP32_SHARDS)]
    ranks = optimizers[0]["partition_count"] if optimizers else len(models)
    if not len(models) == len(optimizers) == ranks:
        raise ToolkitError(
            f"{folder}: written by {ranks} ranks, but it has {len(models)} of {SHARDS} and"
            f" {len(optimizers)} of {FP32_SHARDS}: copy those of every machine into it"
        )
    first, stored = models[0], models[0]["module"]
    state = {name: stored[name] for name in first["buffer_names"] if name in stored}
    for name, shape in (first.get("frozen_param_shapes") or {}).items():
        state[name] = _join([model["frozen_param_fragments"][name] for model in models], shape)
    groups, start = [optimizer["fp32_flat_groups"] for optimizer in optimizers], 0
    for name, shape in [pair for shapes in first["param_shapes"] for pair in shapes.items()]:
        length = -(-shape.numel() // ranks)
        parts = [_cut(group, start, length) for group in groups]
        state[name] = _join(parts, shape).to(stored[name].dtype)
        start += length
    held = sum(group.numel() for group in groups[0])
    if start != held:
        raise ToolkitError(
            f"{folder}: its shapes are of {start} values a rank, but {held} lie there"
        )
    for name, other in (first.get("shared_params") or {}).items():
        state[name] = state[other]
    plural = "" if ranks == 1 else "s"
    return f"DeepSpeed ZeRO-3 of {ranks} rank{plural}", state, {**first, "module": None}


def _by_rank(folder: str, pattern: str) -> list[str]:
    def rank(path: Path) -> int:
        found = re.search(r"zero_pp_rank_(\d+)_", path.name)
        assert found is not None
        return int(found[1])

    return [str(path) for path in sorted(Path(folder).glob(pattern), key=rank)]


def _cut(groups: list[Tensor], start: int, length: int) -> Tensor:
    """values[start : start + length] of the groups laid end to end."""
    parts = []
    for group in groups:
        inside = group[max(start, 0) : max(start + length, 0)]
        if inside.numel():
            parts.append(inside)
        start -= group.numel()
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _join(parts: list[Tensor], shape: torch.Size) -> Tensor:
    flat = [part.flatten() for part in parts]
    whole = flat[0] if len(flat) == 1 else torch.cat(flat)
    return whole[: shape.numel()].view(shape)
