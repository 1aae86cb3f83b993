"""Products of a few rows x with stored weights, on every card from sm_75 on.

Weights are read as they are stored, fp16, bf16, int8 or packed int4, with layer norm, bias, GELU
and residual around the product. Beyond MOST_ROWS a library's product of the dequantised weight is
faster (benchmarks/products.py). B rows, K in, N out.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .compiler import Kernel, get_kernel

MOST_ROWS = 32
_TILE, _THREADS = 16, 8 * 32
_BYTES_PER_STEP = 8 * 4 * 16  # of a weight row, by 8 warps
_MOST_STAGED_BYTES = 100 << 10
"""So that two blocks fit a processor; more of x is read where it stands."""


@dataclass(frozen=True)
class Norm:
    """A layer norm before a product: weight and bias (K,), and epsilon."""

    weight: Tensor
    bias: Tensor
    epsilon: float


def bits_of(weight: Tensor, in_features: int) -> int:
    """16, 8 or 4, of a weight (N, K) of half precision or int8, or (N, K / 2) of packed int4."""
    return 16 if weight.is_floating_point() else 8 * weight.shape[1] // in_features


def supports_linear(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes x (.., K) and the weight: a GPU from sm_75 on, a shape that fits."""
    if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    in_features, (out_features, stored) = x.shape[-1], weight.shape
    capability = torch.cuda.get_device_capability(x.device)
    enough = capability >= ((8, 0) if x.dtype == torch.bfloat16 else (7, 5))
    row_bytes = stored * weight.element_size()
    fits = row_bytes % _BYTES_PER_STEP == 0 and out_features % _TILE == 0
    return enough and fits and weight.is_contiguous() and in_features % 2048 == 0


def supports_norm(rows: int, in_features: int, device: torch.device) -> bool:
    """Whether so many rows of x have room in shared memory, which `linear` needs for a norm."""
    case = _Case(rows, in_features, _TILE, 16, device.index, ("NORM",))
    return case.staged_bytes + 2048 * case.rows <= _shared_memory(case.device)


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    normed: Tensor | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    alpha: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """x (B, K) times the weight's transpose, (B, N), for B up to MOST_ROWS.

    weight: (N, K) in x's dtype, or int8, or (N, K / 2) packed int4, with scale (N,) in fp16. norm:
    x goes through it first, and is written to normed (B, K) so. gelu: the tanh kind, after the
    bias. residual (B, N): alpha times it is added at the end. Sums are fp32 throughout; a row of up
    to 8 comes out the same alone and among the others.
    """
    (rows, in_features), out_features = x.shape, weight.shape[0]
    asked = {"NORM": norm, "BIAS": bias, "GELU": gelu or None, "RESIDUAL": residual,
             "BF16": x.dtype == torch.bfloat16 or None}  # fmt: skip
    flags = tuple(name for name, value in asked.items() if value is not None)
    bits = bits_of(weight, in_features)
    case = _Case(rows, in_features, out_features, bits, x.device.index, flags)
    plan = _plan(case)
    out = x.new_empty(rows, out_features) if out is None else out
    epsilon = norm.epsilon if norm else 0.0
    norm_weight, norm_bias = (norm.weight, norm.bias) if norm else (None, None)
    plan.kernel.launch(
        (plan.blocks, 1, 1),
        _THREADS,
        [x, weight, scale, bias, out, norm_weight, norm_bias, normed, residual, rows, out_features,
         epsilon, float(alpha)],
    )  # fmt: skip
    return out


def library_gelu(x: Tensor, linear: nn.Linear, *, out: Tensor | None = None) -> Tensor:
    """GELU (tanh) of the linear, with a bias, of x (.., K), in one kernel of the library on a GPU;
    out must be of the right shape."""
    rows = x.flatten(0, -2)
    to = None if out is None else out.flatten(0, -2)
    found = torch._addmm_activation(linear.bias, rows, linear.weight.T, use_gelu=True, out=to)
    return found.unflatten(0, x.shape[:-1])


@dataclass(frozen=True)
class _Case:
    """What a kernel is compiled for; rows are rounded up to a power of two, for few kernels."""

    given_rows: int
    in_features: int
    out_features: int
    bits: int
    device: int
    flags: tuple[str, ...]

    @property
    def rows(self) -> int:
        return 1 << (self.given_rows - 1).bit_length()

    @property
    def row_bytes(self) -> int:
        """Of the weight."""
        return self.in_features * self.bits // 8

    @property
    def staged_bytes(self) -> int:
        """Shared memory that x takes."""
        return self.rows * (self.in_features + 32) * 2

    @property
    def tiles(self) -> int:
        return self.out_features // _TILE

    @property
    def after_floats(self) -> int:
        """Of a tile: what comes after its sums."""
        adds = "BIAS" in self.flags or "RESIDUAL" in self.flags
        return (_TILE if self.bits < 16 else 0) + (self.rows * _TILE if adds else 0)

    @property
    def after_bytes(self) -> int:
        """Shared memory for those of a block."""
        return -(-self.tiles // self.blocks) * self.after_floats * 4

    @property
    def blocks(self) -> int:
        """Two a processor; more, if a block would have more tiles than 16 threads for each."""
        least = -(-self.tiles // (_THREADS // 16)) if self.after_floats else 1
        return min(self.tiles, max(2 * num_processors(self.device), least))

    @property
    def defines(self) -> tuple[str, ...]:
        sizes = (f"BITS={self.bits}", f"IN_FEATURES={self.in_features}", f"ROWS={self.rows}")
        return (*sizes, *self.flags)


@dataclass(frozen=True)
class _Plan:
    kernel: Kernel
    blocks: int


@functools.lru_cache(maxsize=256)
def _plan(case: _Case) -> _Plan:
    steps = case.row_bytes // _BYTES_PER_STEP
    room = min(_MOST_STAGED_BYTES, _shared_memory(case.device) - 2048 * case.rows)
    staged = "NORM" in case.flags or case.staged_bytes <= room
    defines = (
        f"UNROLL={next(n for n in (4, 2, 1) if steps % n == 0)}",
        *case.defines,
        *(["STAGED"] if staged else []),
    )
    shared_bytes = case.after_bytes + (case.staged_bytes if staged else 0)
    return _Plan(get_kernel("linear", case.device, defines, shared_bytes), case.blocks)


def _shared_memory(device: int) -> int:
    """Bytes that a block may have at the most."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin


def num_processors(device: int) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
