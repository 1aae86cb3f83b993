"""Linears and embeddings over weights in the released row-wise int8 and int4 formats.

Row by row, scale = max |row| / (2**(bits - 1) - 1) in fp16 and q = round(w / scale). int8 stores
(out, in); int4 (out, in / 2) with the even column in the high nibble and the odd one in the low,
both signed. The stored tensors are used as they are: the kernels of decoding read them so, and for
other products weights are dequantised.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import cpu, ops, products

PART = 1 << 22
"""Weights dequantised at a time on a CPU: 8 MiB in half precision, which stay in its cache."""

VALUES_AT_ONCE = 1 << 23
"""Of a weight that is being packed: little memory in between, and few waits of threads."""


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
    num_rows, columns = weight.shape
    packed = weight.new_empty((num_rows, columns * bits // 8), dtype=torch.int8)
    scale = weight.new_empty(num_rows, dtype=torch.float16)
    step = max(VALUES_AT_ONCE // columns, 1)
    for start in range(0, num_rows, step):
        some = slice(start, start + step)
        packed[some], scale[some] = _quantize_some(weight[some].half(), bits)
    return packed, scale


def _quantize_some(half: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    scale = half.abs().amax(dim=1) / (2 ** (bits - 1) - 1)
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    values = (half / divisor[:, None]).round().to(torch.int8)
    return (pack_int4(values) if bits == 4 else values), scale


def dequantize_rows(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The (out, in) matrix in `dtype`."""
    if ops.supports_dequantize(weight, scale, dtype):
        return ops.dequantize(weight, scale, bits, dtype)
    if cpu.supports_dequantize(weight, scale, dtype):
        return cpu.dequantize(weight, scale, bits, dtype)
    values = unpack_int4(weight) if bits == 4 else weight
    return values.to(dtype).mul_(scale[:, None].to(dtype))


class _QuantizedProduct(torch.autograd.Function):
    """x (N, in) times the dequantised weight, (N, out); the backward pass dequantises again.

    Kept for the backward pass are the packed weights, not the matrix: a quarter of the bytes for
    int4 against half a precision.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.bits = bits
        added = None if bias is None else bias.to(x.dtype)
        return F.linear(x, dequantize_rows(weight, scale, bits, x.dtype), added)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, scale = ctx.saved_tensors
        for_x = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = gradient @ dequantize_rows(weight, scale, ctx.bits, gradient.dtype)
        if ctx.needs_input_grad[3]:
            for_bias = gradient.sum(0)
        return for_x, None, None, for_bias, None


def product_on_cpu(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """x (N, in) times the dequantised weight, (N, out), on a CPU and without gradient.

    Few rows of x meet the weights as they are stored, many a part of them dequantised at a time.
    """
    if cpu.supports(x, weight):
        return cpu.multiply(x, weight, scale=scale, bias=bias)
    if bits == 8 and len(x) <= cpu.MOST_ROWS[weight.dtype]:
        product = torch._weight_int8pack_mm(x.float(), weight, scale.float())
        return (product if bias is None else product.add_(bias)).to(x.dtype)
    out = x.new_empty(len(x), len(weight))
    step = max(1, PART // x.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        matrix = dequantize_rows(weight[rows], scale[rows], bits, x.dtype)
        out[:, rows] = F.linear(x, matrix, None if bias is None else bias[rows].to(x.dtype))
    return out


def product_on_gpu(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """The same on a GPU: few rows by a kernel, for many the whole weight is dequantised."""
    added = None if bias is None else bias.to(x.dtype)
    if 0 < len(x) <= products.MOST_ROWS and products.supports_linear(x, weight):
        known = scale.dtype == torch.float16 and not torch.compiler.is_compiling()
        if known and ops.reason_against_card(x.device.index) is None:
            return products.linear(x.contiguous(), weight, scale=scale, bias=added)
    return F.linear(x, dequantize_rows(weight, scale, bits, x.dtype), added)


_WITHOUT_GRADIENT = {"cpu": product_on_cpu, "cuda": product_on_gpu}


class QuantizedLinear(nn.Linear):
    """x (.., in) to (.., out) over a packed weight; differentiable in x and bias.

    An `nn.Linear`, so that PEFT puts its adapters around it as around any other.
    """

    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, bits: int, *, bias: bool = True):
        nn.Module.__init__(self)  # not Linear's, which would draw a weight of full size
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        stored = in_features // 2 if bits == 4 else in_features
        self.weight = nn.Parameter(
            torch.zeros(out_features, stored, dtype=torch.int8), requires_grad=False
        )
        # As released, whatever the model's precision: bf16 would round them.
        self.register_buffer("weight_scale", torch.zeros(out_features, dtype=torch.float16))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """The product with the dequantised weight, in x's dtype or that of autocast."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        multiply, rows = _QuantizedProduct.apply, x.flatten(0, -2)
        if not torch.is_grad_enabled() and kind in _WITHOUT_GRADIENT:
            multiply = _WITHOUT_GRADIENT[kind]
        product = multiply(rows, self.weight, self.weight_scale, self.bias, self.bits)
        return product if x.dim() == 2 else product.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn, recurse: bool = True) -> "QuantizedLinear":
        """A change of the model's precision leaves the scales' alone."""
        dtype, scale = self.weight_scale.dtype, self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def dequantize(self, dtype: torch.dtype) -> nn.Linear:
        """A plain linear of the same values."""
        where: Any = {"device": self.weight.device, "dtype": dtype}
        has_bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, bias=has_bias, **where)
        with torch.no_grad():
            linear.weight.copy_(dequantize_rows(self.weight, self.weight_scale, self.bits, dtype))
            if has_bias:
                linear.bias.copy_(self.bias)
        return linear

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int) -> "QuantizedLinear":
        """A linear's weight packed as the released code packs it; the bias is shared."""
        with torch.device("meta"):  # all three tensors are replaced
            quantized = cls(
                linear.in_features, linear.out_features, bits, bias=linear.bias is not None
            )
        values, quantized.weight_scale = quantize_rows(linear.weight.detach(), bits)
        quantized.weight = nn.Parameter(values, requires_grad=False)
        quantized.bias = linear.bias
        return quantized


class QuantizedEmbedding(nn.Module):
    """Token ids (..) to rows (.., C) of a packed table (`quantization_embeddings`)."""

    weight: Tensor
    weight_scale: Tensor
    like: Tensor

    def __init__(self, rows: int, columns: int, bits: int):
        super().__init__()
        self.bits = bits
        stored = columns // 2 if bits == 4 else columns
        self.register_buffer("weight", torch.zeros(rows, stored, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(rows, dtype=torch.float16))
        # In the precision of the model, which the rows are given in.
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Only the rows asked for are dequantised."""
        rows, scale = self.weight[input_ids.flatten()], self.weight_scale[input_ids.flatten()]
        hidden = dequantize_rows(rows, scale, self.bits, self.like.dtype)
        return hidden.view(*input_ids.shape, -1)

    def _apply(self, fn, recurse: bool = True) -> "QuantizedEmbedding":
        """As for a QuantizedLinear."""
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, bits: int) -> "QuantizedEmbedding":
        """An embedding's table packed as the released code packs it."""
        with torch.device("meta"):
            quantized = cls(embedding.num_embeddings, embedding.embedding_dim, bits)
        table = embedding.weight.detach()
        quantized.weight, quantized.weight_scale = quantize_rows(table, bits)
        quantized.like = table.new_empty(0)
        return quantized

    def dequantize(self, dtype: torch.dtype) -> nn.Embedding:
        """A plain embedding of the same values."""
        table = dequantize_rows(self.weight, self.weight_scale, self.bits, dtype)
        return nn.Embedding.from_pretrained(table, freeze=False)


def quantize_blocks(layers: nn.Module, bits: int, device: torch.device | None = None) -> None:
    """Pack the weight of every linear below `layers`, in place, one at a time on the device.

    device: None for where each is.
    """
    _replace(
        layers, (nn.Linear,), lambda linear: QuantizedLinear.from_linear(linear.to(device), bits)
    )


def dequantize_packed(model: nn.Module, dtype: torch.dtype) -> None:
    """Plain linears, and a plain embedding, of the same values, in place."""
    _replace(model, (QuantizedLinear, QuantizedEmbedding), lambda packed: packed.dequantize(dtype))


def is_packed(model: nn.Module) -> bool:
    """True if weights are packed the released way."""
    return any(isinstance(m, QuantizedLinear | QuantizedEmbedding) for m in model.modules())


def _replace(
    parent: nn.Module, kinds: tuple[type[nn.Module], ...], change: Callable[[Any], nn.Module]
) -> None:
    keepers = [module for module in parent.modules() if type(module) not in kinds]
    for module in keepers:  # a list of all would keep every replaced one in memory
        for name in [name for name, child in module.named_children() if type(child) in kinds]:
            child = getattr(module, name)
            setattr(module, name, change(child).train(child.training))
