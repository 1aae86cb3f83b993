"""Before the first step: what this setting will take of the card and of the disk."""

from dataclasses import dataclass

import torch
from torch import nn

from .configuration import ChatGLMConfig
from .run_settings import Settings

STATES = {"adamw": 2, "adam": 2, "lamb": 2, "lion": 1, "adafactor": 0}
"""Values that an optimizer keeps for each trained one, in its precision; 8-bit ones keep bytes."""
ACTIVATION_WIDTHS = 18
"""Activations that a block keeps for its backward pass, in hidden widths a token: the inputs of
both norms and of the two linears after them, q, k and v as they come (3), q and k turned, the
attention's output, and the inner layer twice (4 each)."""
FUSED_WIDTHS = 10
"""The same by the GPU kernels, in half precision, where the linears are frozen: the input of both
norms, q, k and v turned, the attention's output, the inner layer once."""
INPUT_WIDTHS = {"query_key_value": 1, "dense": 0, "dense_h_to_4h": 1, "dense_4h_to_h": 4}
"""More for a linear that trains itself or has an adapter: its input, if it is not kept yet."""
DROPPED_WIDTHS = {"query_key_value": 1.5, "dense": 1.5, "dense_h_to_4h": 1.5, "dense_4h_to_h": 6}
"""The same where the adapter's input is dropped out: what is left, and a byte each for which."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, by what takes them."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations")
        named = ", ".join(f"{part} {getattr(self, part) / 2**30:.2f}" for part in parts)
        return f"{self.total / 2**30:.2f} GiB ({named})"


def estimate_memory(
    model: nn.Module, config: ChatGLMConfig, settings: Settings, *, num_tokens: int
) -> MemoryEstimate:
    """What training takes for a batch of num_tokens tokens, pads included.

    settings: with gradient_checkpointing by its name (building.resolve_settings). DeepSpeed's
    splitting and offloading are not reckoned in.
    """
    train = settings.train
    trained = [p for p in model.parameters() if p.requires_grad]
    width = 4 if train.precision == "32" or settings.method == "full" else 2
    layer = config.hidden_size * num_tokens * width
    kept = _kept_widths(settings, width) * layer
    if train.gradient_checkpointing == "none":
        activations = config.num_layers * kept
    else:  # one input a block, or a half of one, and all of one block at a time
        inputs = 2 if train.gradient_checkpointing == "selective" else 1
        activations = config.num_layers * inputs * layer + 2 * kept
    return MemoryEstimate(
        weights=sum(p.nbytes for p in [*model.parameters(), *model.buffers()]),
        gradients=sum(p.nbytes for p in trained),
        optimizer=sum(p.numel() * state_bytes(train.optimizer, p.dtype) for p in trained),
        activations=round(activations) + 3 * 256 * config.vocab_size * 4,
    )


def _kept_widths(settings: Settings, width: int) -> float:
    train, lora = settings.train, settings.lora
    by_kernels = train.fused_kernels and train.packing and width == 2 and torch.cuda.is_available()
    held_by_others = bool(settings.model.bitsandbytes_bits)
    if not by_kernels or held_by_others or settings.method == "adalora" or lora.use_dora:
        return ACTIVATION_WIDTHS
    if settings.method in ("full", "freeze"):
        return FUSED_WIDTHS + sum(INPUT_WIDTHS.values())
    targets = lora.target_modules if settings.method == "lora" else []
    widths = DROPPED_WIDTHS if lora.lora_dropout else INPUT_WIDTHS
    return FUSED_WIDTHS + sum(widths[name] for name in targets)


def state_bytes(optimizer: str, dtype: torch.dtype) -> int:
    """Bytes that an optimizer keeps on the device for each trained value; paged ones may none."""
    return 0 if "paged" in optimizer else _stored_bytes(optimizer, dtype)


def _stored_bytes(optimizer: str, dtype: torch.dtype) -> int:
    kept = next(count for name, count in STATES.items() if name in optimizer)
    if "bit" in optimizer:  # of bitsandbytes
        return kept * (1 if "8bit" in optimizer else 4)
    return kept * dtype.itemsize


def checkpoint_bytes(model: nn.Module, settings: Settings) -> int:
    """Room on the disk for best/, last/ and resume/, one of them twice while it is replaced."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if settings.method in ("full", "freeze"):
        width = 4 if settings.train.precision == "32" else 2
        saved = sum(tensor.numel() for tensor in model.state_dict().values()) * width
    else:
        saved = sum(p.nbytes for p in trained)
    if settings.train.save_every_steps == -1:
        return 3 * saved
    states = (p.numel() * _stored_bytes(settings.train.optimizer, p.dtype) for p in trained)
    resume = sum(p.nbytes for p in trained) + sum(states)
    return 2 * saved + resume + max(saved, resume)
