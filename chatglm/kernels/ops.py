"""The other kernels as functions of tensors. B rows, K in, N out, H heads, D head width.

Everything is fp16 or bf16 on one GPU. What a kernel can't do is said by the `supports_` functions,
before it is asked for.
"""

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from .compiler import Kernel, KernelError, get_kernel

logger = logging.getLogger("chatglm")

THREADS = 256
MOST_TOP_K = 1024
HEAD_WIDTH, _ATTENTION_THREADS = 128, 128
FEW_ROWS = 8
_GROUPS, _GROUPS_OF_MANY = 12, 1
"""Blocks that share the keys of a head, of up to FEW_ROWS rows and of more, whose heads alone keep
a card busy. Among few rows the sums of one are the same whatever their number, to the last bit."""


@functools.cache
def reason_against_card(device: int) -> str | None:
    """Why no kernel can be compiled or run on a GPU, or None; said once."""
    try:
        get_kernel("sample", device, ())
    except (KernelError, OSError) as error:
        logger.warning("plain torch does the work of the GPU kernels, and slower: %s", error)
        return str(error)
    return None


class AttentionWorkspace:
    """What the parts of one step's attention are joined through; for up to so many rows."""

    def __init__(self, rows: int, heads: int, device: torch.device):
        shape = (rows, heads, _GROUPS, HEAD_WIDTH + 2)
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
    scales: Tensor | None = None,
    pages: Tensor | None = None,
    keys_are_new: bool = False,
) -> Tensor:
    """One new token a row over its cache: (B, 3 H D), query, key and value per head, to (B, H D).

    keys, values (B, H, capacity, D): the new ones are put at lengths (B,) int32. rotary: cosine and
    sine (positions, 64) in fp32. The token stands at text_positions (B,) and, in the answer, at
    lengths - first_blocks (B,). scales (2, B, H, capacity) fp32: keys and values are int8, and to
    be multiplied with these. pages (B, columns) int32: keys and values are pages of 64, (pages, H,
    64, D), and these are the rows'. keys_are_new: the kernel before may have written to the cache.
    """
    sequences, heads, capacity, width = keys.shape
    flags = {"BF16": mixed.dtype == torch.bfloat16, "CACHE8": scales is not None,
             "PAGED": pages is not None, "WAITS": keys_are_new}  # fmt: skip
    columns = 0 if pages is None else pages.shape[1]
    _attention_kernel(mixed.device.index, flags).launch(
        (_GROUPS if len(mixed) <= FEW_ROWS else _GROUPS_OF_MANY, heads, len(mixed)),
        _ATTENTION_THREADS,
        [mixed, keys, values, scales, *rotary, lengths, text_positions, first_blocks,
         workspace.parts, workspace.counters, out, sequences, heads, capacity, width**-0.5, pages,
         columns],
    )  # fmt: skip
    return out


def _attention_kernel(device: int, flags: dict[str, bool]) -> Kernel:
    named = (name for name, is_set in flags.items() if is_set)
    return get_kernel("attention", device, tuple(named))


def attention_of_drafts(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    lengths: Tensor,
    workspace: AttentionWorkspace,
    out: Tensor,
) -> Tensor:
    """T tokens of one sequence that follow each other: turned query (1, H, T, D) to (T, H D).

    keys, values (1, H, capacity, D): those of the tokens stand from lengths (1,) int32 on, and each
    token sees all up to its own. workspace: of T rows.
    """
    _, heads, capacity, width = keys.shape
    flags = {"BF16": query.dtype == torch.bfloat16, "DRAFTS": True}
    _attention_kernel(query.device.index, flags).launch(
        (_GROUPS, heads, query.shape[2]),
        _ATTENTION_THREADS,
        [query, keys, values, None, None, None, lengths, None, None, workspace.parts,
         workspace.counters, out, 1, heads, capacity, width**-0.5, None, 0],
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
    is_ring: bool = False,
) -> None:
    """The next token of each row from scores (B, V).

    Written: tokens (B,), history (steps, B) at the row's step, the token's row of embedding (V, K)
    to hidden (B, K); steps and lengths (B,) count on; all int32. A row with NaN or inf among its
    scores gets guard_token. is_ring: after the last line of the history comes its first again, a
    row whose step is below 0 is left as it is, and a row is drawn by its length and not its step,
    which is that of all; history may be some columns of a wider one.
    """
    rows, vocabulary = scores.shape
    ring = (f"RING={len(history)}", f"HISTORY_ROWS={history.stride(0)}") if is_ring else ()
    defines = (*ring, *(("BF16",) if scores.dtype == torch.bfloat16 else ()))
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
    if not rows:
        return out
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
    offset: int | None,
) -> Tensor:
    """The turned query (B, H, T, D) out of mixed (B, T, 3 H D); key and value go into the cache.

    positions (B, 2, T) int32; keys, values (B, H, capacity, D), filled from offset on. rotary: as
    for `attention`. Without offset, the tokens are drafts of one sequence, and positions (3,) int32
    its length, text position and first block as `attention` has them.
    """
    rows, tokens = mixed.shape[:2]
    _, heads, capacity, width = keys.shape
    query = mixed.new_empty(rows, heads, tokens, width)
    defines = [
        *(["BF16"] if mixed.dtype == torch.bfloat16 else []),
        *(["STEP"] if offset is None else []),
    ]
    kernel = get_kernel("rotate", mixed.device.index, tuple(defines))
    kernel.launch(
        (-(-heads // (THREADS // 32)), tokens, rows),
        THREADS,
        [mixed, *rotary, positions, query, keys, values, tokens, heads, capacity, offset or 0],
    )
    return query
