"""C compiled for the CPU at hand by the system's compiler, kept on disk, and loaded.

torch's own products of int8 and int4 reach half of what the memory gives, and want int4 in another
layout than the released one. cpu.c reads the stored tensors as they are. It runs on the threads of
the OpenMP library that torch brings: a second pool of threads would spin against the first.
"""

import ctypes
import functools
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from .code_cache import cached_path, keep
from .compiler import SOURCES, KernelError

logger = logging.getLogger("chatglm")

MOST_ROWS = {torch.int8: 16, torch.bfloat16: 4, torch.float16: 4}
"""Of x, by weight: with more, one dequantising or torch's own product costs less."""
FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-fno-trapping-math", "-fno-math-errno")
_DIGITS = {torch.bfloat16: 2, torch.float16: 3, torch.float32: 4}
"""Of x where the CPU multiplies bytes; each is a pass over the weights, but not over the memory."""
_KINDS = {torch.float16: 16, torch.bfloat16: 17, torch.float32: 32}


def _compiler() -> str:
    named = os.environ.get("CC")
    for name in [named] if named else ["cc", "gcc", "clang"]:
        path = shutil.which(name)
        if path:
            return path
    raise KernelError(f"{named or 'a C compiler'} is not to be found; install gcc (Debian, Ubuntu:"
                      " apt install gcc)")  # fmt: skip


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        told = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    except OSError:
        told = []
    return "".join([platform.machine(), platform.processor(), *told])


def _compile(compiler: str, target: pathlib.Path) -> None:
    command = [compiler, *FLAGS, str(SOURCES / "cpu.c"), "-o", str(target), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        fault = next((line for line in said if "error" in line), said[0])
        raise KernelError(f"{compiler} does not compile cpu.c: {fault}")


def _load() -> ctypes.CDLL:
    """cpu.c, from the cache folder if it stands there.

    Raises:
        KernelError: if there is no compiler, or it or the loader refuses.
    """
    key = ((SOURCES / "cpu.c").read_text(), FLAGS, _processor())
    path = cached_path("cpu", ".so", key)
    try:
        if path.exists():
            return ctypes.CDLL(str(path))
        with tempfile.TemporaryDirectory() as aside:
            built = pathlib.Path(aside, path.name)
            _compile(_compiler(), built)
            keep(path, built.read_bytes())
            return ctypes.CDLL(str(built))
    except OSError as error:
        raise KernelError(f"cpu.c can't be loaded: {' '.join(str(error).split())}") from None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """cpu.c, or None; then the reason has been said."""
    try:
        library = _load()
    except KernelError as error:
        logger.warning("decoding on this CPU at the slower pace of torch: %s", error)
        return None
    number, pointer, flag = ctypes.c_long, ctypes.c_void_p, ctypes.c_int
    library.multiply.argtypes = (
        flag, flag, pointer, flag, flag, number, number, pointer, pointer, pointer, pointer, flag
    )  # fmt: skip
    library.dequantize.argtypes = (flag, flag, number, number, pointer, pointer, pointer, flag)
    return library


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiply` takes x (B, K) and the weight: few rows, on a CPU, without gradient."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    few = 0 < len(x) <= MOST_ROWS.get(weight.dtype, 0)
    return few and x.dtype in _KINDS and weight.is_contiguous() and _library() is not None


def multiply(
    x: Tensor, weight: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """x (B, K) times the weight's transpose, (B, N) in x's dtype, for few rows: see MOST_ROWS.

    weight: (N, K) in half precision, or int8, or (N, K / 2) packed int4, with scale (N,) in fp16.
    Sums are fp32 at least, whatever x's dtype.
    """
    assert scale is None or scale.dtype == torch.float16
    (rows, columns), outputs = x.shape, len(weight)
    kind = _KINDS[weight.dtype] if scale is None else 8 * weight.shape[1] // columns
    numbers = (x.float() if x.dtype == torch.float16 else x).contiguous()
    added = None if bias is None else bias.to(numbers.dtype)
    out = torch.empty(rows, outputs, dtype=numbers.dtype)
    _call(
        "multiply", kind, _KINDS[numbers.dtype], numbers, rows, _DIGITS[x.dtype], columns, outputs,
        weight, scale, added, out, torch.get_num_threads(),
    )  # fmt: skip
    return out.to(x.dtype)


def apply_linear(linear: Any, x: Tensor) -> Tensor:
    """linear(x), x (.., K) to (.., N); by `multiply` if it is a plain one that this takes.

    Whatever stands around it (an adapter, a hook) is obeyed.
    """
    rows = x.flatten(0, -2)
    if x.dtype != linear.weight.dtype or not supports(rows, linear.weight):
        return linear(x)
    changed = type(linear) is not nn.Linear or "forward" in vars(linear)
    if changed or linear._forward_hooks or linear._forward_pre_hooks:
        return linear(x)
    return multiply(rows, linear.weight, bias=linear.bias).view(*x.shape[:-1], -1)


def supports_dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether `dequantize` takes the packed weight."""
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    known = scale.dtype == torch.float16 and dtype in _KINDS
    return known and weight.is_contiguous() and _library() is not None


def dequantize(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) behind packed weight (N, K * bits / 8) int8 and scale (N,) in fp16."""
    outputs, columns = len(weight), 8 * weight.shape[1] // bits
    out = torch.empty(outputs, columns, dtype=dtype)
    _call(
        "dequantize", bits, _KINDS[dtype], columns, outputs, weight, scale, out,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _call(name: str, *arguments: Any) -> None:
    """A function of cpu.c, with tensors (which must be contiguous) as pointers."""
    values = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]
    if getattr(_library(), name)(*values):
        raise MemoryError(f"no memory for {name} on the CPU")
