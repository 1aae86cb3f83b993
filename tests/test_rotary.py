"""Rotary tables and rotation against the released numbers and a loop over single pairs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatglm.rotary import apply_rotary, rotary_for_positions, rotary_tables

CPU = torch.device("cpu")


def half_steps(a, b):
    """Distance in units of the last place of fp16."""
    ordered = [t.view(torch.int16).int() for t in (a, b)]
    return (ordered[0] - ordered[1]).abs().max().item()


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_half_tables_are_the_released_ones_within_one_step_of_fp16(golden, name):
    table = dict(zip(("cos", "sin"), rotary_tables(2048, 64, half=True, device=CPU), strict=True))
    kept = table[name].half()
    assert torch.equal(kept.float(), table[name])
    assert torch.equal(kept[:, :32], kept[:, 32:])
    expected = golden[f"rotary_half.{name}"]
    assert half_steps(kept[:, :32], expected) <= 1
    assert (kept[:, :32] != expected).float().mean() < 1e-3


def test_fp32_tables_round_the_frequencies_only(golden):
    cos, sin = rotary_tables(2048, 64, half=False, device=CPU)
    angles = torch.outer(torch.arange(2048).double(), golden["rotary_half.inv_freq"].double())
    assert (cos[:, :32] - angles.cos()).abs().max() < 2e-4  # fp32 angles near 2048 step by 1.2e-4
    assert (sin[:, :32] - angles.sin()).abs().max() < 2e-4


@given(st.integers(0, 2047), st.integers(0, 2047), st.booleans())
def test_each_half_of_a_head_turns_by_its_own_row(text, block, half):
    positions = torch.tensor([[[text], [block]]])
    x = torch.randn(1, 2, 1, 128, generator=torch.Generator().manual_seed(text))
    cos, sin = rotary_for_positions(positions, max_length=2048, head_width=128, half=half)
    turned = apply_rotary(x, cos, sin)[0, :, 0]
    tables = rotary_tables(2048, 64, half=half, device=CPU)
    for start, position in ((0, text), (64, block)):
        for pair in range(0, 32, 7):
            a, b = x[0, :, 0, start + pair], x[0, :, 0, start + pair + 32]
            c, s = (table[position, pair].item() for table in tables)
            assert torch.allclose(turned[:, start + pair], a * c - b * s, atol=1e-5)
            assert torch.allclose(turned[:, start + pair + 32], b * c + a * s, atol=1e-5)


@given(st.integers(0, 900), st.integers(0, 900), st.integers(0, 900))
def test_a_product_depends_on_the_distance_alone(first, second, shift):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 128, generator=generator) for _ in range(2))

    def product(i, j):
        turned = [
            apply_rotary(x, *rotary_for_positions(
                torch.tensor([[[at], [0]]]), max_length=2048, head_width=128, half=False))
            for x, at in ((q, i), (k, j))
        ]  # fmt: skip
        return (turned[0] * turned[1]).sum().item()

    assert math.isclose(product(first, second), product(first + shift, second + shift),
                        abs_tol=2e-2)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rotation_gives_back_the_type_it_was_given(dtype):
    x = torch.randn(1, 1, 3, 16, dtype=dtype)
    positions = torch.arange(3).expand(1, 2, 3)
    tables = rotary_for_positions(positions, max_length=8, head_width=16, half=True)
    assert apply_rotary(x, *tables).dtype == dtype
