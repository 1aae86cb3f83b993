"""p-tuning v2: everything is frozen but the encoder of the virtual tokens (prefix.py)."""

from typing import Any

import torch
from torch import Tensor

from ..errors import ToolkitError
from ..model import ChatGLMForConditionalGeneration
from ..prefix import PrefixEncoder

PREFIX = "transformer.prefix_encoder."


def train_prefix(
    model: ChatGLMForConditionalGeneration, *, pre_seq_len: int, prefix_projection: bool
) -> None:
    """Freeze all but the prefix encoder, which is a new one unless the weights came with one.

    A new one has torch's start values, an embedding from N(0, 1), as in the released code.

    Raises:
        ToolkitError: if the weights' own encoder is of another size.
    """
    config: Any = model.config  # declared as the base class of all configurations
    wanted = (pre_seq_len, prefix_projection)
    if model.transformer.prefix_encoder is None:
        config.pre_seq_len, config.prefix_projection = wanted
        model.transformer.prefix_encoder = PrefixEncoder(config).to(model.device)
    elif (config.pre_seq_len, config.prefix_projection) != wanted:
        raise ToolkitError(
            f"pre_seq_len {pre_seq_len} and prefix_projection {prefix_projection}: the weights have"
            f" a prefix encoder of {config.pre_seq_len} and {config.prefix_projection} already"
        )
    model.requires_grad_(False)
    model.transformer.prefix_encoder.requires_grad_(True)


def prefix_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a model's state dict, `transformer.prefix_encoder.*`."""
    return {n: t.contiguous() for n, t in state.items() if n.startswith(PREFIX)}


def add_prefix(
    model: ChatGLMForConditionalGeneration, state: dict[str, Tensor], where: str
) -> None:
    """Give a loaded model the encoder whose tensors are in `state`, on its device.

    Its size follows from the tensors: (P, layers * 2 * C), or (P, C) with a projection. It computes
    in the tensors' precision or the model's, whichever is more.

    Raises:
        ToolkitError: naming the tensors that are missing, surplus or misshapen.
    """
    config: Any = model.config
    table = state.get(f"{PREFIX}embedding.weight")
    if table is None:
        raise ToolkitError(f"{where}: no tensor {PREFIX}embedding.weight")
    config.pre_seq_len = table.shape[0]
    config.prefix_projection = any(name.startswith(f"{PREFIX}trans.") for name in state)
    encoder = PrefixEncoder(config)
    own = {f"{PREFIX}{name}": tensor.shape for name, tensor in encoder.state_dict().items()}
    faults = [f"{name} missing" for name in own.keys() - state.keys()]
    faults += [f"{name} surplus" for name in state.keys() - own.keys()]
    faults += [
        f"{name} {list(state[name].shape)} != {list(shape)}"
        for name, shape in own.items()
        if name in state and state[name].shape != shape
    ]
    if faults:
        raise ToolkitError(f"{where}: not a prefix encoder of this model: {'; '.join(faults)}")
    encoder.load_state_dict({n.removeprefix(PREFIX): t for n, t in state.items()})
    dtype: Any = torch.promote_types(table.dtype, model.dtype)  # type: ignore[arg-type]
    encoder = encoder.to(model.device, dtype)
    model.transformer.prefix_encoder = encoder.train(model.training)
