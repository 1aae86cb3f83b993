"""What a training leaves: full weights, virtual tokens, or an adapter; saved, and read back.

Each folder has the settings.json of its run, so that nobody names a rank or the base weights twice.
"""

import copy
import os
import shutil
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import ToolkitError
from .files import replace_folder
from .run_settings import Settings
from .saved import PREFIX_FILE, load_prefix, readable
from .sharding import is_split
from .tokenizer import ChatGLMTokenizer
from .tuning import ADAPTER_WEIGHTS
from .tuning.adapters import adapter_state, load_adapters, save_adapter
from .tuning.prompt import prefix_state
from .weights import DTYPES, save_folder, weight_files

CHECKED_POSITIONS = 64
"""The last so many of a batch have their logits compared: all would be 1 GB at 130528 rows."""


def save_trained(
    model: Any,
    state: dict[str, Tensor],
    settings: Settings,
    folder: str,
    *,
    tokenizer: ChatGLMTokenizer,
) -> None:
    """What `settings.method` trained, whole or not at all.

    state: the model's, of sharding.whole_state. Full weights are saved in the precision of the
    arithmetic, virtual tokens and adapters in that of training.

    Raises:
        ToolkitError: if it can't be written; what stood in the folder stands then.
    """
    if settings.method in ("full", "freeze"):
        dtype = DTYPES[settings.train.precision]
        save_folder(model, state, tokenizer, settings.as_json(), folder, dtype=dtype)
        return
    aside = f"{folder}.part"
    shutil.rmtree(aside, ignore_errors=True)
    os.makedirs(aside)
    if settings.method == "ptuning":
        save_file(prefix_state(state), os.path.join(aside, PREFIX_FILE), metadata={"format": "pt"})
        model.config.save_pretrained(aside)
    else:
        save_adapter(model, state, aside)
    with open(os.path.join(aside, "settings.json"), "w", encoding="utf-8") as file:
        file.write(settings.as_json())
    replace_folder(aside, folder)


def check_saved(
    model: Any,
    state: dict[str, Tensor],
    settings: Settings,
    folder: str,
    batch: dict[str, Tensor],
) -> None:
    """Read a saved folder back: its tensors are those of `state`, and its logits the model's.

    An adapter or prefix encoder is loaded, the way the infer scripts do, onto a copy of the model
    that shares its frozen weights and has NaN for trained ones. Full weights are lent from the file
    to each module for its forward pass, so that no second model needs room. The logits are those of
    `batch`; a model that ZeRO-3 has split gives none.

    Raises:
        ToolkitError: if a tensor differs, or logits do by more than the rounding of the file's
            precision.
    """
    _check_tensors(_trained_part(model, state, settings), folder)
    if is_split(model):
        return
    training = model.training
    model.eval()
    inputs: dict[str, Any] = {
        n: batch[n] for n in ("input_ids", "context_lengths", "mask_positions")
    }
    inputs |= {"use_cache": False, "logits_to_keep": CHECKED_POSITIONS}
    with torch.no_grad():
        expected = model(**inputs).logits
        if settings.method in ("full", "freeze"):
            with _LentWeights(model, folder):
                found = model(**inputs).logits
        else:
            found = _reloaded(model, settings, folder)(**inputs).logits
    model.train(training)
    difference = (found - expected).abs().max().item()
    # Half precision rounds otherwise where a shape or type differs: AdaLoRA's ranks once cut,
    # adapters that DeepSpeed holds in 16 bits. A lost tensor makes more of a difference.
    allowed = (1e-5 if settings.train.precision == "32" else 0.05) * max(
        expected.abs().max().item(), 1.0
    )
    if not difference <= allowed:  # NaN is a difference too
        raise ToolkitError(
            f"{folder}: read back, its logits differ by {difference:.3g} from those of the model"
            f" in training (allowed {allowed:.3g}); the disk may be damaged"
        )


def _trained_part(model: Any, state: dict[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """What a folder's files hold, by name."""
    if settings.method in ("full", "freeze"):
        return state
    return prefix_state(state) if settings.method == "ptuning" else adapter_state(model, state)


def _check_tensors(expected: dict[str, Tensor], folder: str) -> None:
    """The folder's files hold just these tensors, rounded to the files' precision."""
    alone = [os.path.join(folder, name) for name in (PREFIX_FILE, *ADAPTER_WEIGHTS)]
    missing = set(expected)
    for path in [*weight_files(folder), *filter(os.path.exists, alone)]:
        with readable(path), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                stored = file.get_tensor(name)
                if name not in missing or not torch.equal(stored, expected[name].to(stored.dtype)):
                    raise ToolkitError(f"{path}: read back, {name} is not what was saved")
                missing.remove(name)
    if missing:
        raise ToolkitError(f"{folder}: read back, {min(missing)} is missing")


def _reloaded(model: Any, settings: Settings, folder: str) -> nn.Module:
    """A copy of the model with its trained part loaded from the folder."""
    memo: dict[int, Any] = {id(t): t for t in model.buffers()}
    memo |= {id(p): p for p in model.parameters() if not p.requires_grad}
    states = [vars(module).get("state") for module in model.modules()]
    memo |= {id(state): state for state in states if state is not None}  # bitsandbytes int8
    clone = copy.deepcopy(model, memo)
    for parameter in clone.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(float("nan"))
    if settings.method == "ptuning":
        load_prefix(clone, folder)
        return clone.eval()
    return load_adapters(clone.unload(), {"default": folder})


class _LentWeights:
    """While it lasts, each module computes with the tensors of a folder's files."""

    def __init__(self, model: nn.Module, folder: str):
        self.files = [safe_open(path, framework="pt") for path in weight_files(folder)]
        self.where = {name: file for file in self.files for name in file.keys()}  # noqa: SIM118
        self.hooks = []
        for prefix, module in model.named_modules():
            names = {
                name: f"{prefix}.{name}".removeprefix(".")
                for name, _ in module.named_parameters(recurse=False)
                if f"{prefix}.{name}".removeprefix(".") in self.where
            }
            if names:
                self.hooks.append(module.register_forward_pre_hook(self._lend(names)))
                self.hooks.append(module.register_forward_hook(self._give_back))
        self.own: dict[int, dict[str, Tensor]] = {}

    def _lend(self, names: dict[str, str]):
        def hook(module: nn.Module, _: Any) -> None:
            self.own[id(module)] = {name: getattr(module, name).data for name in names}
            for name, full in names.items():
                parameter = getattr(module, name)
                stored = self.where[full].get_tensor(full)
                parameter.data = stored.to(parameter.device, parameter.dtype)

        return hook

    def _give_back(self, module: nn.Module, *_: Any) -> None:
        for name, data in self.own.pop(id(module)).items():
            getattr(module, name).data = data

    def __enter__(self) -> "_LentWeights":
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()
