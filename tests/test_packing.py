"""`model.quantize`: the released tensors, in place, one linear after the other."""

import weakref

import pytest
import torch
from safetensors.torch import load_file

from chatglm.errors import ToolkitError
from chatglm.quantization.linear import QuantizedLinear
from chatglm.tuning.adapters import merge_adapter
from chatglm.weights import load_config, load_model

from .conftest import load
from .tiny_weights import build, logits, settings

TABLE = "transformer.word_embeddings"
EITHER = pytest.mark.parametrize("bits", [8, 4])


@EITHER
def test_quantising_and_saving_gives_the_released_folder(
    checkpoint_folder, quantized_folders, tmp_path, bits
):
    model = load(checkpoint_folder, torch.float16)
    assert not model.quantized and model.quantize(bits) is model and model.quantized
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    released = torch.load(quantized_folders[bits] / "pytorch_model.bin", weights_only=True)
    assert stored.keys() == {name for name in released if not name.endswith("inv_freq")}
    for name, tensor in stored.items():
        assert tensor.dtype == released[name].dtype and torch.equal(tensor, released[name]), name
    config = load_config(str(tmp_path))
    assert (config.quantization_bit, config.quantization_embeddings) == (bits, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize_embeddings", [False, True])
@EITHER
def test_a_quantised_model_loads_again_to_equal_logits(
    checkpoint_folder, tmp_path, bits, quantize_embeddings, dtype
):
    model = load(checkpoint_folder, dtype)
    model.quantize(bits, quantize_embeddings=quantize_embeddings)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype)
    assert again.config.quantization_embeddings == quantize_embeddings
    assert again.state_dict().keys() == model.state_dict().keys()
    assert again.dtype == dtype and torch.equal(logits(again), logits(model))


def test_loading_with_bits_packs_what_quantising_packs(checkpoint_folder, released):
    folder, cpu = str(checkpoint_folder), torch.device("cpu")
    loaded = load_model(
        folder, load_config(folder), dtype=torch.float32, device=cpu, quantization_bit=4
    )
    quantised = load(checkpoint_folder).quantize(4)
    assert torch.equal(logits(loaded.eval()), logits(quantised))
    assert not torch.equal(logits(quantised), logits(released))


@EITHER
def test_packed_embeddings_keep_the_scales_as_stored_in_any_precision(checkpoint_folder, bits):
    model = load(checkpoint_folder, torch.float16).quantize(bits, quantize_embeddings=True)
    names = [f"{TABLE}.weight", "lm_head.weight"]
    stored = {f"{n}{end}": model.state_dict()[f"{n}{end}"] for n in names for end in ("", "_scale")}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model.to(dtype)
        assert logits(model).dtype == dtype
        for name, tensor in stored.items():
            assert torch.equal(model.state_dict()[name], tensor), name


def test_embeddings_may_be_packed_after_the_blocks(checkpoint_folder):
    at_once = load(checkpoint_folder).quantize(4, quantize_embeddings=True)
    later = load(checkpoint_folder).quantize(4).quantize(4, quantize_embeddings=True)
    assert torch.equal(logits(at_once), logits(later))


def test_each_linear_is_freed_before_the_next_is_packed(checkpoint_folder, monkeypatch):
    model, alive = load(checkpoint_folder), []
    linears = [m for m in model.transformer.layers.modules() if type(m) is torch.nn.Linear]
    weights = [weakref.ref(linear.weight) for linear in linears]
    del linears
    pack = QuantizedLinear.from_linear

    def count(linear, bits):
        alive.append(sum(weight() is not None for weight in weights))
        return pack(linear, bits)

    monkeypatch.setattr(QuantizedLinear, "from_linear", count)
    model.quantize(4)
    assert alive == list(range(len(weights), 0, -1))


def test_quantising_keeps_virtual_tokens_and_the_mode(weights_folder):
    model = build(settings(weights_folder, "projection")).eval()
    encoder = {n: t for n, t in model.state_dict().items() if "prefix_encoder" in n}
    model.quantize(8)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in encoder.items())
    assert not any(module.training for module in model.modules())


@EITHER
def test_quantising_again_to_the_same_bits_says_so_and_changes_nothing(
    checkpoint_folder, caplog, bits
):
    model = load(checkpoint_folder).quantize(bits)
    before = logits(model)
    assert not caplog.records and model.quantize(bits) is model
    (record,) = caplog.records
    assert record.getMessage() == f"quantize({bits}): the weights are int{bits} already"
    assert torch.equal(logits(model), before)


@EITHER
def test_quantising_again_to_other_bits_is_refused(checkpoint_folder, quantized_folders, bits):
    for model in (load(checkpoint_folder).quantize(bits), load(quantized_folders[bits])):
        with pytest.raises(ToolkitError, match=rf"\({12 - bits}\): the weights are int{bits} alr"):
            model.quantize(12 - bits)


@pytest.mark.parametrize("bits", [0, 2, 16, "4", None])
def test_other_bits_than_4_and_8_are_refused(released, bits):
    with pytest.raises(ToolkitError, match=r"allowed are 4 and 8 bits"):
        released.quantize(bits)
    assert not released.quantized


def test_what_bitsandbytes_holds_is_refused(weights_folder):
    pytest.importorskip("bitsandbytes")
    folder, cpu = str(weights_folder), torch.device("cpu")
    model = load_model(folder, load_config(folder), dtype=None, device=cpu, bitsandbytes_bits=4)
    with pytest.raises(ToolkitError, match="bitsandbytes holds these weights"):
        model.quantize(4)


def test_weights_under_an_adapter_are_refused_until_it_is_merged(weights_folder):
    model = build(settings(weights_folder, "rslora"))
    with pytest.raises(ToolkitError, match="there is an adapter on these weights"):
        model.quantize(4)
    merged = merge_adapter(model)
    assert merged.quantize(4).quantized
