"""LoRA by the short way, against PEFT's own."""

import copy

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear

from chatglm.settings import LoraSettings
from chatglm.tuning.adapters import add_lora
from chatglm.tuning.fused_lora import fuse_lora

from .test_packed import GPU, WIDE, build, gradients, in_one_row, sequences

pytestmark = GPU


@pytest.fixture
def tuned():
    """See adapted."""
    return adapted()


def adapted(dropout=0.0):
    """bf16 with an adapter in fp32 whose both matrices are random."""
    model = build(WIDE, device="cuda", dtype=torch.bfloat16)
    chosen = ["query_key_value", "dense_4h_to_h"]
    tuned = add_lora(model, LoraSettings(lora_dropout=dropout, target_modules=chosen))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn_like(parameter, dtype=torch.float32)
    return tuned.train()


def losses_and_gradients(model):
    inputs = in_one_row(sequences(9, 100), "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**inputs, use_cache=False, loss_only=True).loss
    return loss, gradients(model, loss)


def test_loss_and_gradients_are_pefts(tuned, monkeypatch):
    other = copy.deepcopy(tuned)
    fuse_lora(other)
    loss, expected = losses_and_gradients(tuned)
    monkeypatch.setattr(LoraLinear, "forward", None)  # PEFT's own way is not taken
    fused, found = losses_and_gradients(other)
    assert abs(loss - fused) < 5e-3
    assert found.keys() == expected.keys() and len(found) == 2 * 2 * WIDE["num_layers"]
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype == torch.float32
        assert (found[name] - gradient).norm() < 0.03 * gradient.norm(), name


def test_an_adapter_that_is_off_adds_nothing(tuned):
    fuse_lora(tuned)
    with_adapter, _ = losses_and_gradients(tuned)
    inputs = in_one_row(sequences(9, 100), "cuda")
    base = build(WIDE, device="cuda", dtype=torch.bfloat16)
    expected = base(**inputs, use_cache=False, loss_only=True).loss
    with tuned.disable_adapter():
        without = tuned(**inputs, use_cache=False, loss_only=True).loss
    assert abs(without - expected) < 1e-6 and abs(without - with_adapter) > 1e-3


def test_dropout_draws_as_the_seed_says():
    tuned = adapted(dropout=0.5)
    fuse_lora(tuned)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(losses_and_gradients(tuned)[0].item())
    assert found[0] == found[1] != found[2]
