"""Linears and embeddings over weights in the released row-wise int8 and int4 formats.

Row by row, scale = max |row| / (2**(bits - 1) - 1) in fp16 and q = round(w / scale). int8 stores
(out, in); int4 (out, in / 2) with the even column in the high nibble and the odd one in the low,
both signed. The stored tensors are used as they are: weights are dequantised for the product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pack_int4(values: Tensor) -> Tensor:
    """Signed values in -8..7, (out, in) int8, packed two to a byte, (out, in / 2) int8."""
    return (values[:, 0::2] << 4) | (values[:, 1::2] & 0x0F)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`: (out, in / 2) int8 to (out, in) int8."""
    high = packed >> 4
    low = (packed << 4) >> 4
    return torch.stack((high, low), dim=-1).flatten(1)


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """weight (out, in) as the released code stores it: int8 values or pairs, and scales (out,).

    Everything is reckoned in fp16, whatever the weight's precision: that is how the released
    files came about. A row of zeros gets scale 0.
    """
    half, largest = weight.half(), 2 ** (bits - 1) - 1
    scale = half.abs().amax(dim=1) / largest
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    values = (half / divisor[:, None]).round().to(torch.int8)
    return (pack_int4(values) if bits == 4 else values), scale


def dequantize_rows(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The (out, in) matrix in `dtype`."""
    values = unpack_int4(weight) if bits == 4 else weight
    return values.to(dtype) * scale[:, None].to(dtype)


class _QuantizedRows(nn.Module):
    """Rows of packed weights and their scales, under the released names."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, rows: int, columns: int, bits: int):
        super().__init__()
        self.bits = bits
        stored = columns // 2 if bits == 4 else columns
        self.register_buffer("weight", torch.zeros(rows, stored, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(rows))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The full matrix in `dtype`."""
        return dequantize_rows(self.weight, self.weight_scale, self.bits, dtype)


class QuantizedLinear(_QuantizedRows):
    """x (.., in) to (.., out) over a packed weight, with bias; differentiable in x and bias."""

    def __init__(self, in_features: int, out_features: int, bits: int):
        super().__init__(out_features, in_features, bits)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """The product with the dequantised weight, in x's dtype."""
        return F.linear(x, self.dequantize(x.dtype), self.bias.to(x.dtype))


class QuantizedEmbedding(_QuantizedRows):
    """Token ids (..) to rows (.., C) of a packed table (`quantization_embeddings`)."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Only the rows asked for are dequantised."""
        rows, scale = self.weight[input_ids.flatten()], self.weight_scale[input_ids.flatten()]
        hidden = dequantize_rows(rows, scale, self.bits, self.weight_scale.dtype)
        return hidden.view(*input_ids.shape, -1)
