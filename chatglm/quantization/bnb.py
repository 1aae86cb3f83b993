"""Frozen weights in bitsandbytes' int8 and nf4 (`load_in_8bit`, `load_in_4bit`)."""

import torch
from transformers import BitsAndBytesConfig

from ..errors import ToolkitError


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
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
