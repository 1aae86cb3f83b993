"""The products of one decoding step, at the model's shapes: why the kernels are what they are.

    python benchmarks/products.py

Microseconds a product, under a CUDA graph, over as many copies of the weight as leave nothing in
the card's cache; TB/s of the weight alone in brackets. "library" is torch's product of the weight
in fp16, "dequantised" that after the packed weight was written out in fp16, "Triton" a plain kernel
that reads the same packed rows.
"""

import os
import statistics
import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from chatglm.kernels import ops, products

SHAPES = [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)]
HEAD = (130528, 4096)
COLD_BYTES = 300 << 20


@triton.jit
def triton_rows(x, weight, scale, out, K: tl.constexpr, BITS: tl.constexpr, N_BLOCK: tl.constexpr,
                K_BLOCK: tl.constexpr):  # fmt: skip
    """One row of x times the rows of a weight of 16, 8 or 4 bits."""
    row = tl.program_id(0) * N_BLOCK + tl.arange(0, N_BLOCK)[:, None]
    sums = tl.zeros((N_BLOCK, K_BLOCK), dtype=tl.float32)
    for first in range(0, K * BITS // 8 // (2 if BITS == 16 else 1), K_BLOCK):
        column = first + tl.arange(0, K_BLOCK)[None, :]
        if BITS == 4:
            both = tl.load(weight + row * (K // 2) + column)
            sums += (both >> 4).to(tl.float32) * tl.load(x + 2 * column)
            sums += ((both << 4) >> 4).to(tl.float32) * tl.load(x + 2 * column + 1)
        else:
            values = tl.load(weight + row * K + column)
            sums += values.to(tl.float32) * tl.load(x + column)
    total = tl.sum(sums, axis=1)[:, None]
    if BITS < 16:
        total = total * tl.load(scale + row)
    tl.store(out + row, total)


def by_triton(x: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """The product of one row through `triton_rows`."""
    bits = products.bits_of(weight, x.shape[1])
    triton_rows[(weight.shape[0] // 8,)](
        x, weight, scale, out, K=x.shape[1], BITS=bits, N_BLOCK=8, K_BLOCK=512, num_warps=4
    )


def stored(shape: tuple[int, int], bits: int) -> tuple[list[Tensor], Tensor | None]:
    """Copies of a random weight, and its scale."""
    out_features, in_features = shape
    copies = max(2, -(-COLD_BYTES // (out_features * in_features * bits // 8)))
    if bits == 16:
        return [torch.randn(shape, dtype=torch.float16, device="cuda") for _ in range(copies)], None
    packed = (out_features, in_features * bits // 8)
    weights = [torch.randint(-128, 128, packed, dtype=torch.int8, device="cuda")
               for _ in range(copies)]  # fmt: skip
    return weights, torch.rand(out_features, device="cuda").half()


def microseconds(work: Callable[[Tensor], object], weights: list[Tensor]) -> float:
    """Of one product, the median of replayed graphs of one for each weight."""
    work(weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            work(weight)
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / 4 / len(weights))
    return statistics.median(times[2:])


def measure(shape: tuple[int, int], bits: int, rows: int) -> dict[str, float]:
    """Microseconds by the name of the way."""
    weights, scale = stored(shape, bits)
    x = torch.randn(rows, shape[1], dtype=torch.float16, device="cuda")
    out = torch.empty(rows, shape[0], dtype=torch.float16, device="cuda")
    ways: dict[str, Callable[[Tensor], object]] = {}
    if bits == 16:
        ways["library"] = lambda weight: torch.mm(x, weight.T, out=out)
    else:
        ways["dequantised"] = lambda weight: torch.mm(
            x, ops.dequantize(weight, scale, bits, torch.float16).T, out=out
        )
    if rows == 1:
        ways["Triton"] = lambda weight: by_triton(x, weight, scale, out)
    found = {name: microseconds(work, weights) for name, work in ways.items()}
    found["here"] = microseconds(lambda w: products.linear(x, w, scale=scale, out=out), weights)
    return found


def main() -> None:
    """Print the table."""
    print(torch.cuda.get_device_name())
    names = ["library", "dequantised", "Triton", "here"]
    print(f"| bits | out x in | rows | {' | '.join(names)} |\n|{'---|' * (3 + len(names))}")
    for bits in (16, 8, 4):
        for shape in [*SHAPES, *([HEAD] if bits == 16 else [])]:
            for rows in (1, 2, 4, 8, 16, 32) if shape == SHAPES[0] else (1, 8):
                found, volume = measure(shape, bits, rows), shape[0] * shape[1] * bits / 8
                cells = [f"{found[name]:.1f} ({volume / found[name] / 1e6:.2f})"
                         if name in found else "" for name in names]  # fmt: skip
                print(f"| {bits} | {shape[0]} x {shape[1]} | {rows} | {' | '.join(cells)} |",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
