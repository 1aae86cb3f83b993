"""Decoding on a CPU at the true size with random weights, beside the dequantising path.

    python benchmarks/decode_cpu.py --products      # 8 GiB of memory
    python benchmarks/decode_cpu.py --only bf16     # 13 GiB

Each side runs in a process of its own, whose peak resident memory counts from its start. Tokens/s
are those of the whole loop, the prompt excluded. Where other work runs on the machine, the times
mean little: the table says how much of the cores others had.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from chatglm.configuration import ChatGLMConfig  # noqa: E402
from chatglm.decoding import generate_tokens  # noqa: E402
from chatglm.kernels import cpu  # noqa: E402
from chatglm.model import ChatGLMForConditionalGeneration  # noqa: E402
from chatglm.sampling import Sampling  # noqa: E402

GIB = 2**30
BITS = {"int4": 4, "int8": 8, "bf16": 0}
PROMPT_TOKENS = 66
READ_BYTES = 2 << 30
DRAWN = 9_999_991  # no multiple of a row
SHAPES = {"query_key_value": (12288, 4096), "dense": (4096, 4096), "dense_h_to_4h": (16384, 4096),
          "dense_4h_to_h": (4096, 16384), "lm_head": (130528, 4096)}  # fmt: skip


def build(kind: str, dtype: torch.dtype) -> ChatGLMForConditionalGeneration:
    """The true shape, packed from the start; head and embedding are one tensor."""
    bits = BITS[kind]
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(ChatGLMConfig(quantization_bit=bits))
    model.lm_head.weight = model.transformer.word_embeddings.weight
    model = model.to(dtype).to_empty(device="cpu").eval()
    model.lm_head.weight = model.transformer.word_embeddings.weight
    torch.manual_seed(0)
    drawn = torch.randn(DRAWN).mul_(0.02).to(dtype)
    packed = torch.randint(-128, 128, (DRAWN,), dtype=torch.int8)
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.int8:
            repeat(packed, tensor)
        elif name.endswith("weight_scale"):
            tensor.fill_(0.02 * 1.7 / (127 if bits == 8 else 7))
        elif "layernorm" in name:
            tensor.fill_(float(name.endswith("weight")))
        else:
            repeat(drawn, tensor)
    return model


def repeat(values: torch.Tensor, target: torch.Tensor) -> None:
    """Fill target with values (DRAWN,) again and again: drawing billions would take minutes."""
    for part in target.view(-1).split(DRAWN):
        part.copy_(values[: len(part)])


def answer(model, new: int) -> list[float]:
    """Seconds to the first token, and from each token to the next."""
    config = model.config
    ids = torch.randint(1000, 100_000, (1, PROMPT_TOKENS))
    ids[:, -2], ids[:, -1] = config.gmask_token_id, config.bos_token_id
    times, before = [], time.perf_counter()
    for _ in generate_tokens(
        model, ids, max_new_tokens=new, sampling=Sampling(do_sample=False), eos_token_ids=[-1]
    ):
        now = time.perf_counter()
        times.append(now - before)
        before = now
    return times


def hide_kernels() -> None:
    """As on a machine without a compiler, and without torch's own int8 product: all dequantised."""
    cpu._library = lambda: None
    cpu.MOST_ROWS[torch.int8] = 0


def peak_gib() -> float:
    """Resident memory of this process at the most, GiB."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / GIB


def share_of_others() -> Callable[[], float]:
    """Starts a watch; calling it gives the cores that others had since, on average."""

    def seconds() -> tuple[float, float, float]:
        with open("/proc/stat") as file:
            ticks = [int(number) for number in file.readline().split()[1:9]]
        mine = os.times()
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        return busy, mine.user + mine.system, time.perf_counter()

    start = seconds()

    def since() -> float:
        busy, mine, passed = (now - then for now, then in zip(seconds(), start, strict=True))
        return (busy - mine) / passed

    return since


def bare_sum(model) -> float:
    """GB/s at which the head's weights can be read at the least, the best of 4 parts."""
    rates = []
    for part in model.lm_head.weight.detach().view(-1).view(torch.float32).chunk(4):
        before = time.perf_counter()
        part.sum()
        rates.append(part.nbytes / (time.perf_counter() - before) / 1e9)
    return max(rates)


def measure(kind: str, dtype: torch.dtype, new: int, plain: bool) -> dict[str, float]:
    """One side of one row: of two answers, the second counts."""
    if plain:
        hide_kernels()
    with torch.inference_mode():
        model = build(kind, dtype)
    answer(model, 2)
    others, read = share_of_others(), bare_sum(model)
    first, *rest = answer(model, new)
    return {
        "tok/s, median": 1 / statistics.median(rest),
        "mean": len(rest) / sum(rest),
        "best": 1 / min(rest),
        "first token, s": first,
        "peak GiB": peak_gib(),
        "bare sum, GB/s": max(read, bare_sum(model)),
        "cores of others": others(),
    }


def best_rate(memory: torch.Tensor, nbytes: int, work: Callable[[torch.Tensor], object]) -> float:
    """GB/s of the best of many calls, each on other bytes, round and round for a second."""
    rates, start, end = [], 0, time.perf_counter() + 1
    while time.perf_counter() < end:
        part = memory[start : start + nbytes]
        before = time.perf_counter()
        work(part)
        rates.append(nbytes / (time.perf_counter() - before) / 1e9)
        start = start + nbytes if start + 2 * nbytes <= len(memory) else 0
    return max(rates)


def ways(outputs: int, columns: int) -> dict[str, tuple[int, Callable[[torch.Tensor], object]]]:
    """Bits of a weight, and the product of one bf16 row with the bytes it is given."""
    x = torch.randn(1, columns).bfloat16()
    scale = torch.rand(outputs).half()
    return {
        "bare sum": (16, lambda part: part.view(torch.float32).sum()),
        "int4": (4, lambda part: cpu.multiply(x, part.view(outputs, -1), scale=scale)),
        "int8": (8, lambda part: cpu.multiply(x, part.view(outputs, -1), scale=scale)),
        "torch int8": (8, lambda part: torch._weight_int8pack_mm(
            x, part.view(outputs, columns), scale.bfloat16())),
        "bf16": (16, lambda part: cpu.multiply(x, part.view(torch.bfloat16).view(outputs, -1))),
        "torch bf16": (16, lambda part: F.linear(x, part.view(torch.bfloat16).view(outputs, -1))),
        "fp16": (16, lambda part: cpu.multiply(x, part.view(torch.float16).view(outputs, -1))),
    }  # fmt: skip


def products() -> None:
    """Print GB/s of weights that a bare sum and each product read."""
    memory = torch.empty(READ_BYTES // 2, dtype=torch.bfloat16)
    repeat(torch.randn(DRAWN).mul_(0.02).bfloat16(), memory)
    for number, (name, (outputs, columns)) in enumerate(SHAPES.items()):
        each = ways(outputs, columns)
        if number == 0:
            print(f"| GB/s, one row | {' | '.join(each)} |\n|{'---|' * (1 + len(each))}")
        rates = [best_rate(memory.view(torch.int8), outputs * columns * bits // 8, work)
                 for bits, work in each.values()]  # fmt: skip
        shown = " | ".join(f"{rate:.1f}" for rate in rates)
        print(f"| {name} {outputs} x {columns} | {shown} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BITS, default=["int4", "int8"])
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--side", choices=["here", "plain"])  # one row, told as JSON
    parser.add_argument("--products", action="store_true")
    given = parser.parse_args()
    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    if given.side:
        plain = given.side == "plain"
        print(json.dumps(measure(given.only[0], dtype, 4 if plain else 64, plain)))
        return
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads")
    if given.products:
        with torch.inference_mode():
            products()
    for number, (kind, side) in enumerate(itertools.product(given.only, ("here", "plain"))):
        command = [sys.executable, __file__, "--only", kind, "--side", side,
                   "--precision", given.precision]  # fmt: skip
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        got = json.loads(told.splitlines()[-1])
        if number == 0:
            print(f"| weights | side | {' | '.join(got)} |\n|{'---|' * (2 + len(got))}")
        shown = " | ".join(f"{value:.2f}" for value in got.values())
        print(f"| {kind} | {side} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
