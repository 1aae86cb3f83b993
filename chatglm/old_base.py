"""What an old checkpoint was trained on: the weights under it, and the settings of our own runs."""

import copy
import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .configuration import ChatGLMConfig
from .errors import ToolkitError
from .old_files import read_old
from .old_parts import sort_tensors
from .run_settings import Settings
from .settings import (
    EMBEDDED_CONFIG,
    AdaLoraSettings,
    DataSettings,
    LoraSettings,
    ModelSettings,
    TrainSettings,
)
from .tokenizer import ChatGLMTokenizer
from .weights import (
    check_tokenizer,
    find_folder,
    load_config,
    load_model,
    load_tokenizer,
    weight_files,
)


@dataclass(frozen=True)
class Base:
    """The weights that were trained on; folder is "" where a training began without."""

    name: str
    folder: str
    config: ChatGLMConfig
    tokenizer: ChatGLMTokenizer

    def weights(self, *, bits: int) -> dict[str, Tensor]:
        """The tensors of its files; packed into so many bits unless 0."""
        if bits:
            config, cpu = copy.deepcopy(self.config), torch.device("cpu")
            model = load_model(self.folder, config, dtype=None, device=cpu, quantization_bit=bits)
            return model.state_dict()
        state: dict[str, Tensor] = {}
        for path in weight_files(self.folder) if self.folder else []:
            parts = sort_tensors(read_old(path).state, path)
            state |= parts.weights | parts.prefix
        return state


def settings_of_run(content: dict[str, Any]) -> Settings:
    """The settings of our own run."""
    groups: list[Any] = []
    for group in (TrainSettings, DataSettings, ModelSettings, LoraSettings, AdaLoraSettings):
        values = content.get(group.section, {}) if hasattr(group, "section") else content
        names = {item.name for item in dataclasses.fields(group)} & values.keys()
        groups.append(group(**{name: values[name] for name in names}))
    return Settings(*groups)


def find_base(name: str, run: Settings | None) -> Base:
    """What `--model_name_or_path` names, or else our own run.

    Raises:
        ToolkitError: if nothing does, or it is not complete.
    """
    named = name or (run.train.model_name_or_path if run else "")
    if named:
        folder = find_folder(named)
        base = Base(named, folder, load_config(folder), load_tokenizer(folder))
    elif run is None:
        raise ToolkitError("give --model_name_or_path: the weights that the checkpoint was trained"
                           " on, for their config.json and tokenizer")  # fmt: skip
    else:
        shape = EMBEDDED_CONFIG if run.train.config_name is None else run.train.config_name
        folder = f"{run.train.output_dir}/tiny_tokenizer"
        if not os.path.isdir(folder):
            raise ToolkitError(f"{folder}: the tokenizer of that run is not there; start where it"
                               " ran, or give --model_name_or_path")  # fmt: skip
        base = Base("", "", load_config(shape), load_tokenizer(folder))
    check_tokenizer(base.tokenizer, base.config, folder)
    return base
