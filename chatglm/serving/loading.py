"""From settings to a loaded model that is ready to be served."""

import os
from dataclasses import dataclass, field
from typing import Literal

from ..building import load_for_inference
from ..errors import ToolkitError
from .served import Served
from .settings import ServeSettings


@dataclass(frozen=True)
class ServedSettings:
    """Which weights are served."""

    checkpoint: str = "./best_ckpt/last"
    """Whatever can be talked to: weights, a hub name, or what train.py saved by any method."""
    model_name_or_path: str = ""
    """The weights under an adapter or a prefix encoder; empty: those it was trained on."""
    adapters: dict[str, str] = field(default_factory=dict)
    """More adapters by name, each a model of its own in requests."""
    quantization_bit: Literal[0, 4, 8] = 0
    """Quantise fp16 weights the released way while loading; 0: as stored, or as in the training."""
    inference_precision: Literal["auto", "32", "bf16", "16"] = "auto"
    """Of the weights; auto: as stored on a GPU; on a CPU 32, over large int8 and int4 bf16."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto: the GPU if there is one."""


def check_checkpoint(which: ServedSettings) -> None:
    """Before anything is loaded.

    Raises:
        ToolkitError: if it is the default and nothing was trained yet.
    """
    if which.checkpoint == ServedSettings.checkpoint and not os.path.isdir(which.checkpoint):
        raise ToolkitError(
            f"checkpoint {which.checkpoint} is not there yet: train the tiny model first (python"
            " train.py), or name another"
        )


def load_served(which: ServedSettings, settings: ServeSettings) -> Served:
    """The model, under its names; says what was loaded."""
    model, tokenizer = load_for_inference(
        which.checkpoint,
        precision=which.inference_precision,
        device=which.device,
        base=which.model_name_or_path,
        adapters=which.adapters,
        quantization_bit=which.quantization_bit,
    )
    served = Served(model, tokenizer, settings)
    print(served.describe())
    return served
