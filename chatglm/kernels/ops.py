"""The kernels as functions of tensors. B rows, K in, N out, H heads, D head width.

Everything is fp16 or bf16 on one GPU. What a kernel can't do is said by the `supports_` functions,
before it is asked for.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .compiler import Kernel, KernelError, get_kernel

THREADS, ROWS_PER_TILE, BLOCKS_PER_SM = 256, 16, 2
MOST_ROWS = 32
MOST_STAGED_BYTES = 100 << 10
"""So that two blocks fit a processor; more of x is read where it stands."""
STREAM, WIDE_INT4 = True, False
_STREAM_THREADS, _CHUNK_BYTES, _STAGE_BYTES = 17 * 32, 1024, 16 * (1024 + 64)
_STATIC_BYTES = 33 << 10  # of shared memory, what the kernels hold beside x, at the most
_BYTES_PER_STEP = 8 * 4 * 16  # of a weight row, by the 8 warps of a block
MOST_TOP_K = 1024
_HEAD_WIDTH, _ATTENTION_THREADS, _KEYS_PER_BLOCK = 128, 128, 64


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
    fits = row_bytes % _BYTES_PER_STEP == 0 and out_features % ROWS_PER_TILE == 0
    return enough and fits and weight.is_contiguous() and in_features % 2048 == 0


@functools.cache
def reason_against_card(device: int) -> str | None:
    """Why no kernel can be compiled or run on a GPU, or None."""
    try:
        get_kernel("sample", device, ())
    except KernelError as error:
        return str(error)
    return None


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
    bias. residual (B, N): alpha times it is added at the end. Sums are fp32 throughout.
    """
    (rows, in_features), out_features = x.shape, weight.shape[0]
    asked = {"NORM": norm, "BIAS": bias, "GELU": gelu or None, "RESIDUAL": residual}
    defines = [
        f"BITS={bits_of(weight, in_features)}",
        f"IN_FEATURES={in_features}",
        f"ROWS={_row_steps(rows)}",
        *(name for name, value in asked.items() if value is not None),
        *(["BF16"] if x.dtype == torch.bfloat16 else []),
    ]
    row_bytes = weight.shape[1] * weight.element_size()
    streams = _can_stream(rows, in_features, row_bytes, x.device)
    if not WIDE_INT4 and bits_of(weight, in_features) == 4 and out_features > 3 * in_features - 1:
        streams = False
    choose = _streamed if streams else _in_registers
    kernel, blocks, threads = choose(defines, rows, in_features, row_bytes, norm, x.device)
    out = x.new_empty(rows, out_features) if out is None else out
    epsilon = norm.epsilon if norm else 0.0
    norm_weight, norm_bias = (norm.weight, norm.bias) if norm else (None, None)
    kernel.launch(
        (min(out_features // ROWS_PER_TILE, blocks), 1, 1),
        threads,
        [x, weight, scale, bias, out, norm_weight, norm_bias, normed, residual, rows,
         out_features, epsilon, float(alpha)],
    )  # fmt: skip
    return out


def _can_stream(rows: int, in_features: int, row_bytes: int, device: torch.device) -> bool:
    room = shared_memory(device) - _stages(in_features) * _STAGE_BYTES - _STATIC_BYTES
    fits = staged_bytes(rows, in_features) <= min(room, MOST_STAGED_BYTES)
    # An eight of x for each thread, and whole stages.
    whole = in_features % (8 * 16 * 32) == 0 and row_bytes % _CHUNK_BYTES == 0
    return (
        STREAM
        and rows <= 8
        and fits
        and whole
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def _stages(in_features: int) -> int:
    """As many as let two blocks of one row stand on a processor."""
    return 5 if in_features <= 4096 else 4


def _streamed(defines, rows, in_features, row_bytes, norm, device) -> tuple[Kernel, int, int]:
    """stream.cu; blocks to start, and threads in each."""
    stages = _stages(in_features)
    shared_bytes = stages * _STAGE_BYTES + staged_bytes(rows, in_features)
    defines = ("STAGED", f"STAGES={stages}", *defines)
    kernel = get_kernel("stream", device.index, defines, shared_bytes)
    return kernel, num_processors(device.index), _STREAM_THREADS


def _in_registers(defines, rows, in_features, row_bytes, norm, device) -> tuple[Kernel, int, int]:
    """linear.cu, likewise."""
    steps = row_bytes // _BYTES_PER_STEP
    shared_bytes = staged_bytes(rows, in_features)
    room = min(shared_memory(device) - _STATIC_BYTES, MOST_STAGED_BYTES)
    staged = norm is not None or shared_bytes <= room
    defines = (f"UNROLL={next(n for n in (4, 2, 1) if steps % n == 0)}", *defines)
    defines += ("STAGED",) if staged else ()
    kernel = get_kernel("linear", device.index, defines, shared_bytes if staged else 0)
    return kernel, BLOCKS_PER_SM * num_processors(device.index), THREADS


def staged_bytes(rows: int, in_features: int) -> int:
    """Shared memory that rows of x take."""
    return _row_steps(rows) * (in_features + 32) * 2


def _row_steps(rows: int) -> int:
    """The next power of two, so that few kernels are made."""
    return 1 << (rows - 1).bit_length()


def supports_norm(rows: int, in_features: int, device: torch.device) -> bool:
    """Whether so many rows of x have room in shared memory, which `linear` needs for a norm."""
    return staged_bytes(rows, in_features) <= shared_memory(device) - _STATIC_BYTES


def shared_memory(device: torch.device) -> int:
    """Bytes that a block may have at the most."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin


def num_processors(device: int) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


class AttentionWorkspace:
    """What the parts of one step's attention are joined through; rows B, room in keys."""

    def __init__(self, rows: int, heads: int, most_keys: int, device: torch.device):
        self.most_keys, self.splits = most_keys, -(-most_keys // _KEYS_PER_BLOCK)
        shape = (rows, heads, self.splits, _HEAD_WIDTH + 2)
        self.parts = torch.empty(shape, dtype=torch.float32, device=device)
        self.counters = torch.zeros(rows, heads, dtype=torch.int32, device=device)


def attention(
    mixed: Tensor,
    keys: Tensor,
    values: Tensor,
    rotary: tuple[Tensor, Tensor],
    *,
    lengths: Tensor,
    text_positions: Tensor,
    first_blocks: Tensor,
    workspace: AttentionWorkspace,
    out: Tensor,
) -> Tensor:
    """One new token a row over its cache: (B, 3 H D), query, key and value per head, to (B, H D).

    keys, values (B, H, capacity, D): the new ones are put at lengths (B,) int32. rotary: cosine and
    sine (positions, 64) in fp32. The token stands at text_positions (B,) and, in the answer, at
    lengths - first_blocks (B,).
    """
    rows, heads, capacity, width = keys.shape
    defines = [f"MOST_KEYS={workspace.most_keys}"]
    if mixed.dtype == torch.bfloat16:
        defines.append("BF16")
    kernel = get_kernel("attention", mixed.device.index, tuple(defines))
    kernel.launch(
        (workspace.splits, heads, rows),
        _ATTENTION_THREADS,
        [mixed, keys, values, *rotary, lengths, text_positions, first_blocks, workspace.parts,
         workspace.counters, out, heads, capacity, width**-0.5],
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class Draw:
    """How each of B rows draws its tokens; tensors, so that a captured step obeys changes.

    seeds (B, 2) int32: a row's seed and stream. top_k (B,) int32, 1 to MOST_TOP_K; 1 is greedy.
    rules (B, 3) fp32: top_p, 1 / temperature, repetition penalty. seen (B, V / 32) int32: a bit for
    each token of the row.
    """

    seeds: Tensor
    top_k: Tensor
    rules: Tensor
    seen: Tensor


def sample(
    scores: Tensor,
    draw: Draw,
    *,
    tokens: Tensor,
    lengths: Tensor,
    steps: Tensor,
    history: Tensor,
    embedding: Tensor,
    hidden: Tensor,
    guard_token: int,
) -> None:
    """The next token of each row from scores (B, V).

    Written: tokens (B,), history (steps, B) at the row's step, the token's row of embedding (V, K)
    to hidden (B, K); steps and lengths (B,) count on; all int32. A row with NaN or inf among its
    scores gets guard_token.
    """
    rows, vocabulary = scores.shape
    defines = ("BF16",) if scores.dtype == torch.bfloat16 else ()
    kernel = get_kernel("sample", scores.device.index, defines)
    kernel.launch(
        (rows, 1, 1),
        MOST_TOP_K,
        [scores, draw.seen, draw.seeds, draw.top_k, draw.rules, tokens, lengths, steps, history,
         embedding, hidden, vocabulary, hidden.shape[1], guard_token],
    )  # fmt: skip


def supports_dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether `dequantize` takes the packed weight."""
    if not weight.is_cuda or dtype not in (torch.float16, torch.bfloat16):
        return False
    if scale.dtype != torch.float16:
        return False
    enough = torch.cuda.get_device_capability(weight.device) >= (7, 5)
    return (
        enough
        and weight.is_contiguous()
        and weight.shape[1] % 8 == 0
        and reason_against_card(weight.device.index) is None
    )


def dequantize(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) behind packed weight (N, K * bits / 8) int8 and scale (N,) in fp16."""
    rows, in_features = weight.shape[0], weight.shape[1] * 8 // bits
    out = torch.empty(rows, in_features, dtype=dtype, device=weight.device)
    defines = [f"BITS={bits}", *(["BF16"] if dtype == torch.bfloat16 else [])]
    kernel = get_kernel("dequantize", weight.device.index, tuple(defines))
    eights = in_features // 8
    kernel.launch((rows, -(-eights // THREADS), 1), THREADS, [weight, scale, out, eights])
    return out


def rotate(
    mixed: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    rotary: tuple[Tensor, Tensor],
    *,
    offset: int,
) -> Tensor:
    """The turned query (B, H, T, D) out of mixed (B, T, 3 H D); key and value go into the cache.

    positions (B, 2, T) int32; keys, values (B, H, capacity, D), filled from offset on. rotary: as
    for `attention`.
    """
    rows, tokens = mixed.shape[:2]
    _, heads, capacity, width = keys.shape
    query = mixed.new_empty(rows, heads, tokens, width)
    defines = ("BF16",) if mixed.dtype == torch.bfloat16 else ()
    kernel = get_kernel("rotate", mixed.device.index, defines)
    kernel.launch(
        (-(-heads // (THREADS // 32)), tokens, rows),
        THREADS,
        [mixed, *rotary, positions, query, keys, values, tokens, heads, capacity, offset],
    )
    return query
