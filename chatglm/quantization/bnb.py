"""Frozen weights in bitsandbytes' int8 and nf4 (`load_in_8bit`, `load_in_4bit`)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from ..errors import ToolkitError

KEPT_WHOLE = ["lm_head", "transformer.prefix_encoder"]
"""Modules whose linears are not packed: the head, and what p-tuning trains."""


def bitsandbytes_config(bits: int, *, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What `from_pretrained(quantization_config=...)` takes; 4 bits are nf4, quantised twice.

    Raises:
        ToolkitError: if bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ToolkitError(f"load_in_{bits}bit needs bitsandbytes ({error}): pip install"
                           " bitsandbytes, or use quantization_bit") from None  # fmt: skip
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT_WHOLE)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=KEPT_WHOLE,
    )


def settle_nf4(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Have nf4 weights dequantised to `dtype` (None: as stored), and stay as they are in eval mode.

    On CPUs with AVX512-BF16 bitsandbytes else repacks them at the first answer: in place, for a
    product in bf16 that has no gradient, so that no training goes on after a dev loss.
    """
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.weight.quant_state.dtype = dtype or module.weight.quant_state.dtype


def is_bitsandbytes(model: nn.Module) -> bool:
    """True if bitsandbytes holds weights of the model."""
    return any(type(p).__name__ in ("Int8Params", "Params4bit") for p in model.parameters())
