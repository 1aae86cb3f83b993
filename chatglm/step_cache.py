"""Keys and values of captured steps: room for all of an answer, where the graph expects it.

With 8 bits they are int8, each key and value with a scale of its own, which halves their memory and
the time of reading them. A prompt is read in full precision, and rounded once its layer is done.
"""

from typing import Any

import torch
from torch import Tensor


class StepCache:
    """(layers, 2, B, H, capacity, D) of a model: the key and the value of each token."""

    def __init__(self, model: Any, *, rows: int, room: int, bits: int = 16):
        config, self.bits, self.dtype = model.config, bits, model.transformer.dtype
        shape = (config.num_layers, 2, rows, config.num_attention_heads, room, config.head_width)
        kind = torch.int8 if bits == 8 else self.dtype
        self.stored = torch.zeros(shape, dtype=kind, device=model.device)
        self.scales: Tensor | None = None
        if bits == 8:
            self.scales = torch.zeros(shape[:-1], dtype=torch.float32, device=model.device)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return self.stored.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def layer(self, number: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (B, H, capacity, D), and scales (2, B, H, capacity) if they are int8."""
        keys, values = self.stored[number]
        return keys, values, None if self.scales is None else self.scales[number]

    def room_for_prompt(self, number: int, length: int) -> tuple[Tensor, Tensor]:
        """Where a layer's keys and values of a prompt go, in full precision."""
        if self.scales is None:
            keys, values = self.stored[number]
        else:
            shape = (*self.stored.shape[1:4], length, self.stored.shape[-1])
            keys, values = self.stored.new_empty(shape, dtype=self.dtype)
        return keys, values

    def keep_prompt(self, number: int, keys: Tensor, values: Tensor) -> None:
        """Round what was put there, if it is to be rounded."""
        if self.scales is None:
            return
        for part, x in enumerate((keys, values)):
            scale = x.abs().amax(dim=-1).float() / 127
            steps = (x / scale.where(scale > 0, 1)[..., None]).round()
            length = x.shape[2]
            self.stored[number, part, :, :, :length] = steps.to(torch.int8)
            self.scales[number, part, :, :, :length] = scale
