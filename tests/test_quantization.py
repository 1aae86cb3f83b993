"""The released int8 and int4 formats: packing, rounding, and the layers over them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatglm.quantization.linear import (
    QuantizedEmbedding,
    QuantizedLinear,
    dequantize_packed,
    dequantize_rows,
    is_packed,
    pack_int4,
    quantize_blocks,
    quantize_rows,
    unpack_int4,
)

from .conftest import load

nibbles = st.integers(1, 5).flatmap(
    lambda pairs: st.lists(
        st.lists(st.integers(-8, 7), min_size=2 * pairs, max_size=2 * pairs), min_size=1, max_size=4
    )
)


def random_weight(rows=12, columns=32, dtype=torch.float16):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


@given(nibbles)
def test_unpacking_gives_back_what_was_packed(rows):
    values = torch.tensor(rows, dtype=torch.int8)
    packed = pack_int4(values)
    assert packed.dtype == torch.int8
    assert packed.shape == (len(rows), len(rows[0]) // 2)
    assert torch.equal(unpack_int4(packed), values)


@given(st.integers(-8, 7), st.integers(-8, 7))
def test_the_even_column_stands_in_the_high_nibble(even, odd):
    byte = pack_int4(torch.tensor([[even, odd]], dtype=torch.int8)).item() & 0xFF
    assert (byte >> 4, byte & 15) == (even & 15, odd & 15)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_weight_comes_back_within_half_a_step(bits, dtype):
    weight = random_weight(dtype=dtype)
    packed, scale = quantize_rows(weight, bits)
    assert scale.dtype == torch.float16
    error = (dequantize_rows(packed, scale, bits, torch.float32) - weight.float()).abs()
    # fp16 rounds the quotient (up to 127) and the scale by 2**-11 of themselves
    bound = scale.float() * (0.5 + 2 ** (bits - 1) * 2**-10)
    assert (error <= bound[:, None]).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_rows_are_the_released_ones(quantized_folders, released_state, bits):
    stored = torch.load(quantized_folders[bits] / "pytorch_model.bin", weights_only=True)
    for name in (name for name in stored if f"{name}_scale" in stored):
        packed, scale = quantize_rows(released_state[name], bits)
        assert torch.equal(packed, stored[name]), name
        assert torch.equal(scale, stored[f"{name}_scale"]), name


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_of_zeros_stays_zero(bits):
    packed, scale = quantize_rows(torch.zeros(2, 4), bits)
    assert torch.equal(dequantize_rows(packed, scale, bits, torch.float32), torch.zeros(2, 4))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_linear_is_the_linear_of_its_dequantised_weight(bits):
    linear = QuantizedLinear(32, 12, bits)
    values, linear.weight_scale = quantize_rows(random_weight(), bits)
    linear.weight = torch.nn.Parameter(values, requires_grad=False)
    linear.bias.data.normal_()
    x = torch.randn(2, 3, 32, requires_grad=True)
    full = dequantize_rows(linear.weight, linear.weight_scale, bits, torch.float32)
    output = linear(x)
    assert torch.allclose(output, x @ full.T + linear.bias, atol=1e-5)
    output.sum().backward()
    assert torch.allclose(x.grad, full.sum(0).expand_as(x), atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_embedding_gives_rows_of_the_dequantised_table(bits):
    table = QuantizedEmbedding(12, 32, bits).half()
    table.weight, table.weight_scale = quantize_rows(random_weight(), bits)
    full = dequantize_rows(table.weight, table.weight_scale, bits, torch.float16)
    ids = torch.tensor([[3, 0], [11, 3]])
    assert torch.equal(table(ids), full[ids])
    assert torch.equal(table.dequantize(torch.float16)(ids), full[ids])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_stay_as_stored_in_a_model_of_another_precision(
    quantized_folders, released_state, bits, dtype
):
    name = "transformer.layers.3.mlp.dense_4h_to_h.weight"
    _, scale = quantize_rows(released_state[name], bits)
    loaded = load(quantized_folders[bits], dtype=dtype)
    for model in (loaded, loaded.to(torch.bfloat16), loaded.float()):
        assert torch.equal(model.state_dict()[f"{name}_scale"], scale)


@pytest.mark.parametrize("bits", [8, 4])
def test_packing_and_dequantising_leave_plain_linears_of_the_nearest_values(bits):
    block = torch.nn.ModuleDict({"in": torch.nn.Linear(32, 12), "out": torch.nn.Linear(12, 8)})
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    quantize_blocks(block, bits, torch.device("cpu"))
    assert is_packed(block) and block.state_dict()["in.weight"].dtype == torch.int8
    dequantize_packed(block, torch.float32)
    assert not is_packed(block) and type(block["in"]) is type(block["out"]) is torch.nn.Linear
    for name, tensor in block.state_dict().items():
        if name.endswith("bias"):
            assert torch.equal(tensor, before[name])
        else:
            step = before[name].abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
            assert ((tensor - before[name]).abs() <= 0.6 * step).all()
