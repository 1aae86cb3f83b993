"""CUDA C compiled for the card at hand, kept on disk, and launched.

NVRTC, the compiler, comes with torch; what it makes stays on disk (code_cache.py). Kernels are
launched through the driver itself: `cpm_kernels`, which the released code uses for this, knows no
launch attributes, and one of them lets a kernel start while the one before it drains (a seventh of
the time of a token in int4).
"""

import ctypes
import functools
import glob
import pathlib
import re
import struct
import sys
import sysconfig
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .code_cache import cached_path, keep

SOURCES = pathlib.Path(__file__).parent
_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_MOST_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class KernelError(RuntimeError):
    """The compiler or the driver refused; the text says why, in one line."""


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared_bytes")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    ]


class _LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _compiler() -> ctypes.CDLL:
    major = (torch.version.cuda or "").split(".")[0]
    name = f"libnvrtc.so.{major}"
    packages = sysconfig.get_path("purelib")
    beside_torch = sorted(glob.glob(f"{packages}/nvidia/*/lib/{name}"))
    in_toolkit = [f"/usr/local/cuda/lib64/{name}"]
    for path in [*beside_torch, name, *in_toolkit]:
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise KernelError(f"{name} is not to be found: reinstall torch, or install nvidia-cuda-nvrtc")


@functools.cache
def source_of(name: str) -> str:
    """The whole of NAME.cu, with what stands before it in all kernels and what it includes."""
    text = (SOURCES / "common.cuh").read_text() + (SOURCES / f"{name}.cu").read_text()
    return re.sub(r'#include "(.+)"', lambda found: (SOURCES / found[1]).read_text(), text)


def compile_source(name: str, arch: int, defines: tuple[str, ...]) -> bytes:
    """Machine code of NAME.cu for a card of compute capability `arch` (90 for 9.0).

    defines: "NAME" or "NAME=VALUE".

    Raises:
        KernelError: with the compiler's first complaint.
    """
    nvrtc = _compiler()
    source = source_of(name)
    options = [f"-arch=sm_{arch}", "-std=c++17", *(f"-D{one}" for one in defines)]
    handle = ctypes.c_void_p()
    as_bytes = [option.encode() for option in options]
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(handle), source.encode(), f"{name}.cu".encode(), 0, None, None
    )
    try:
        failed = nvrtc.nvrtcCompileProgram(
            handle, len(as_bytes), (ctypes.c_char_p * len(as_bytes))(*as_bytes)
        )
        if failed:
            said = _read(nvrtc, handle, "ProgramLog").decode(errors="replace").split("\n")
            fault = next((line for line in said if "error" in line), said[0])
            raise KernelError(f"{name}.cu does not compile for sm_{arch}: {fault}")
        return _read(nvrtc, handle, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(handle))


def _read(nvrtc: ctypes.CDLL, handle: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(handle, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(handle, buffer)
    return buffer.raw[: size.value]


def _compiled(name: str, arch: int, defines: tuple[str, ...]) -> bytes:
    path = cached_path(name, ".cubin", (source_of(name), arch, defines, torch.version.cuda))
    if path.exists():
        return path.read_bytes()
    _say_that_kernels_are_compiled(path.parent)
    code = compile_source(name, arch, defines)
    keep(path, code)
    return code


@functools.cache
def _say_that_kernels_are_compiled(folder: pathlib.Path) -> None:
    print(f"compiling GPU kernels for this card, some seconds, once: kept in {folder}",
          file=sys.stderr)  # fmt: skip


class Kernel:
    """One compiled kernel, loaded on one device."""

    def __init__(self, name: str, device: int, defines: tuple[str, ...], shared_bytes: int):
        major, minor = torch.cuda.get_device_capability(device)
        self.name, self.device, self.shared_bytes = name, device, shared_bytes
        self._attributes = (_LaunchAttribute * 1)()
        self._attributes[0] = _LaunchAttribute(
            _PROGRAMMATIC_SERIALIZATION, 0, (ctypes.c_int * 16)(1)
        )
        self._num_attributes = 1 if major >= 9 else 0
        code = _compiled(name, 10 * major + minor, defines)
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes torch's context, if none is yet
            self._check(_driver().cuModuleLoadData(ctypes.byref(module), code), "load")
            self._check(
                _driver().cuModuleGetFunction(ctypes.byref(self.function), module, name.encode()),
                "load",
            )
            if shared_bytes:  # beside what the kernel has without asking
                self._check(
                    _driver().cuFuncSetAttribute(self.function, _MOST_SHARED_BYTES, shared_bytes),
                    "give shared memory to",
                )

    def _check(self, status: int, doing: str) -> None:
        if status:
            text = ctypes.c_char_p()
            _driver().cuGetErrorString(status, ctypes.byref(text))
            raise KernelError(f"could not {doing} {self.name}: {(text.value or b'').decode()}")

    def launch(self, grid: Sequence[int], threads: int, arguments: Sequence[Any]) -> None:
        """Start the kernel on torch's current stream of its device.

        arguments: tensors (None: a null pointer), ints (32 bits) and floats (32 bits), in the
        kernel's order; tensors must be contiguous, and outlive the launch.
        """
        number = len(arguments)
        values = (ctypes.c_uint64 * number)(*map(_bits_of, arguments))
        first = ctypes.addressof(values)
        addresses = (ctypes.c_void_p * number)(*range(first, first + 8 * number, 8))
        stream = torch.cuda.current_stream(self.device).cuda_stream
        config = _LaunchConfig(
            *grid, threads, 1, 1, self.shared_bytes, stream,
            ctypes.addressof(self._attributes), self._num_attributes,
        )  # fmt: skip
        launch = _driver().cuLaunchKernelEx
        if torch.cuda.current_device() == self.device:
            status = launch(ctypes.byref(config), self.function, addresses, None)
        else:
            with torch.cuda.device(self.device):
                status = launch(ctypes.byref(config), self.function, addresses, None)
        self._check(status, "launch")


def _bits_of(value: Tensor | int | float | None) -> int:
    """An argument as it stands in memory; the upper half of one of 32 bits is not looked at."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if value is None:
        return 0
    return value if isinstance(value, int) else int.from_bytes(struct.pack("<f", value), "little")


@functools.cache
def get_kernel(name: str, device: int, defines: tuple[str, ...], shared_bytes: int = 0) -> Kernel:
    """The kernel NAME of NAME.cu with these defines, compiled and loaded once.

    Raises:
        KernelError: if it can't be compiled or loaded.
    """
    return Kernel(name, device, defines, shared_bytes)
