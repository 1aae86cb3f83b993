"""Why a model is not for the kernels, in words; without a GPU only what comes before the card."""

import pytest
import torch
from torch import nn

from chatglm import supported
from chatglm.kernels import products


class OnAGpu:
    """The tiny model, but for its device."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return torch.device("cuda:0") if name == "device" else getattr(self.model, name)


@pytest.fixture
def wide(released, monkeypatch):
    """As if heads were 128 wide, and every shape suited."""
    monkeypatch.setattr(type(released.config), "head_width", 128)
    monkeypatch.setattr(products, "supports_linear", lambda *_: True)
    monkeypatch.setattr(supported.ops, "reason_against_card", lambda device: None)
    return OnAGpu(released)


def test_a_model_on_a_cpu_is_told_so(released):
    assert supported.reason_against(released) == "the model is not on a CUDA device"


def test_heads_of_another_width_are_told(released):
    assert supported.reason_against(OnAGpu(released)) == "its heads are 16 wide"


def test_fp32_is_told(wide):
    assert supported.reason_against(wide) == "its precision is float32"


def test_a_strange_linear_is_told(wide, monkeypatch):
    class Strange(nn.Linear):
        pass

    monkeypatch.setattr(wide.transformer.layers[1].mlp, "dense_h_to_4h", Strange(64, 256))
    assert "Strange" in supported.reason_against(wide)


def test_a_wrapped_head_is_told(wide, monkeypatch):
    monkeypatch.setattr(wide.model, "lm_head", nn.Sequential(wide.lm_head))
    assert supported.reason_against(wide) == "in place of its Linear stands a Sequential"


def test_half_precision_is_taken_and_a_bias_left_in_fp32_is_told(wide, monkeypatch):
    half = OnAGpu(type(wide.model)(wide.config).half())
    assert supported.reason_against(half) is None
    dense = half.transformer.layers[0].attention.dense
    dense.bias = nn.Parameter(dense.bias.float())
    assert supported.reason_against(half) == "its precision is float16, float32"
