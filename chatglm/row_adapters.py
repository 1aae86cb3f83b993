"""Several adapters in one batch, each row with its own.

PEFT answers with one adapter at a time, or splits a batch by adapter. Here the adapters of a linear
stand stacked, and each row picks its own: two more batched products a linear, whatever the mixture
(Chen et al. 2023, "Punica: Multi-Tenant LoRA Serving"). tuning/rows.py makes them of PEFT's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RowAdapters:
    """Which adapter each row of the next pass has. names: of all adapters."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names, self.device = list(names), device
        self._numbers = {name: number for number, name in enumerate(self.names, start=1)}
        self.index: Tensor | None = None  # (B,), 0 for the bare weights; None: all have those

    def numbers(self, names: Sequence[str | None]) -> list[int]:
        """Of adapters by name, 0 for the bare weights."""
        return [0 if name is None else self._numbers[name] for name in names]

    def choose(self, names: Sequence[str | None]) -> None:
        """The adapter of each row, None for the bare weights."""
        numbers = self.numbers(names)
        self.index = torch.tensor(numbers, device=self.device) if any(numbers) else None


class RowLinear(nn.Module):
    """A linear with all adapters on it. down (N + 1, R, in), up (N + 1, out, R), number 0 zero."""

    down: Tensor
    up: Tensor

    def __init__(self, linear: nn.Module, down: Tensor, up: Tensor, adapters: RowAdapters):
        super().__init__()
        self.linear, self.adapters = linear, adapters
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) to (B, T, out); or (T, in), with an index for each token, to (T, out)."""
        out, index = self.linear(x), self.adapters.index
        if index is None:
            return out
        return out + (self.added(x, index) if x.dim() == 3 else self.added_to_tokens(x, index))

    def added(self, x: Tensor, index: Tensor) -> Tensor:
        """What the adapters index (B,) add for x (B, T, in), in its precision."""
        down, up = self.down[index], self.up[index]
        return (x.to(down.dtype) @ down.mT @ up.mT).to(x.dtype)

    def added_to_tokens(self, x: Tensor, index: Tensor) -> Tensor:
        """The same for x (T, in) and index (T,): all adapters at once, and none but each's own."""
        inner = x.to(self.down.dtype) @ self.down.flatten(0, 1).T  # (T, (N + 1) R)
        others = index[:, None] != torch.arange(len(self.down), device=index.device)
        inner = inner.unflatten(1, (len(self.down), -1)).masked_fill(others[..., None], 0)
        return (inner.flatten(1) @ self.up.mT.flatten(0, 1)).to(x.dtype)
