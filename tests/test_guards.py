"""Each guard lets a sound training pass, and says what, where and what to do at the first fault."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from chatglm.batches import FILLER, Item, collate
from chatglm.configuration import ChatGLMConfig
from chatglm.errors import ToolkitError
from chatglm.guards import (
    check_disk,
    check_gradients,
    check_labels,
    check_loss,
    explaining_memory,
    first_nonfinite_layer,
    out_of_memory_advice,
)
from chatglm.model import ChatGLMForConditionalGeneration
from chatglm.run_settings import Settings
from chatglm.settings import (
    AdaLoraSettings,
    DataSettings,
    LoraSettings,
    ModelSettings,
    TrainSettings,
)
from chatglm.strategies import Sample
from chatglm.tuning.adapters import add_adalora, add_lora

GMASK, SOP, EOP = 6, 7, 8
CONFIG = {
    "vocab_size": 64, "hidden_size": 32, "inner_hidden_size": 64, "num_layers": 3,
    "num_attention_heads": 4, "max_sequence_length": 64, "bos_token_id": SOP, "eos_token_id": EOP,
    "mask_token_id": 4, "gmask_token_id": GMASK, "pad_token_id": 3,
}  # fmt: skip
LAYERS = (
    "transformer.word_embeddings",
    "transformer.layers.0.input_layernorm",
    "transformer.layers.1.attention.query_key_value",
    "transformer.layers.1.attention.dense",
    "transformer.layers.2.mlp.dense_4h_to_h",
    "transformer.final_layernorm",
    "lm_head",
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ChatGLMForConditionalGeneration(ChatGLMConfig(**CONFIG))


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def batch(request):
    rows = [(17, [10, 11, GMASK, SOP, 40, 41, EOP], 3), (4, [10, GMASK, SOP, 42, EOP], 2)]
    items = [(Item(index, 5.0), Sample(ids, context)) for index, ids, context in rows]
    return collate(items, pad_token_id=3, packing=request.param)


def label(batch, row, value, *, at=slice(None)):
    """Set the labels of a sample, or the one at a place of it."""
    if "packed" not in batch:
        batch["labels"][row, at] = value
        return
    places = (batch["packed"].sequence == row).nonzero()[:, 0]
    batch["labels"][0, places[at]] = value


@torch.no_grad()
def poison(model, name, value=float("nan")):
    dict(model.named_parameters())[name].flatten()[3] = value


def test_batches_that_learn_their_answers_pass(batch):
    check_labels(batch)
    label(batch, 1, -100)
    batch["sample_index"][1] = FILLER
    check_labels(batch)


@pytest.mark.parametrize("position", [0, 2, 3])
def test_a_learned_token_of_the_prompt_stops_with_the_sample(batch, position):
    label(batch, 0, 10, at=position)
    with pytest.raises(ToolkitError, match=r"samples \[17\] learn tokens of their prompt: build"):
        check_labels(batch)


def test_a_sample_that_learns_nothing_stops_with_its_index(batch):
    label(batch, 1, -100)
    with pytest.raises(ToolkitError, match=r"samples \[4\] learn nothing: build the records anew"):
        check_labels(batch)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_loss_that_is_not_a_number_names_step_first_layer_and_samples(model, batch, layer):
    poison(model, f"{layer}.weight")
    expected = f"the loss became nan at step 9, first in {layer}, on samples [17, 4]: "
    with pytest.raises(ToolkitError, match=re.escape(expected)):
        check_loss(float("nan"), model, batch, step=9, precision="32")


def test_a_layer_that_overflows_with_finite_weights_is_named(model, batch):
    layer = model.transformer.layers[1].mlp
    with torch.no_grad():
        layer.dense_h_to_4h.weight.fill_(1e30)
        layer.dense_4h_to_h.weight.fill_(1e30)
    assert first_nonfinite_layer(model, batch) == "transformer.layers.1.mlp.dense_4h_to_h"


@pytest.mark.parametrize("part", ["lora_A", "lora_E"])
def test_a_poisoned_adapter_is_found_in_its_linear(model, batch, part):
    if part == "lora_E":
        tuned = add_adalora(model, AdaLoraSettings(with_lora=True), total_steps=10)
    else:
        tuned = add_lora(model, LoraSettings(with_lora=True))
    (name,) = [
        n for n, _ in tuned.named_parameters() if f"layers.1.attention.query_key_value.{part}" in n
    ]
    poison(tuned, name)
    assert "layers.1.attention.query_key_value" in first_nonfinite_layer(tuned, batch)


def test_looking_for_the_layer_leaves_no_hooks_and_no_gradients(model, batch):
    assert first_nonfinite_layer(model, batch) == ""
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_sound_model_has_its_fault_in_the_loss_alone(model, batch, loss):
    with pytest.raises(ToolkitError, match=f"became {loss} at step 1, in the loss alone, on"):
        check_loss(loss, model, batch, step=1, precision="32")


@pytest.mark.parametrize(
    ("precision", "advice"),
    [("16", "use precision bf16"), ("bf16", "lower learning_rate"), ("32", "lower learning_rate")],
)
def test_the_advice_is_the_precisions(model, batch, precision, advice):
    with pytest.raises(ToolkitError, match=f": {advice}"):
        check_loss(float("nan"), model, batch, step=1, precision=precision)


def test_a_loss_of_exactly_0_stops(model, batch):
    with pytest.raises(ToolkitError, match=r"became 0 at step 3 on samples \[17, 4\]: nothing is"):
        check_loss(0.0, model, batch, step=3, precision="32")


def test_a_sound_loss_costs_no_forward_pass(batch):
    for loss in (0.01, 12.0, 1e-30):
        check_loss(loss, None, batch, step=1, precision="32")


def test_a_parameter_without_gradient_is_named():
    named = [("reached", torch.ones(2)), ("untouched", None)]
    with pytest.raises(ToolkitError, match="no gradient reaches untouched: these would be saved"):
        check_gradients(iter(named))
    many = [(f"layer{number}", None) for number in range(8)]
    with pytest.raises(ToolkitError, match="layer0, layer1, layer2, layer3, layer4 and 3 more: "):
        check_gradients(iter(many))


def test_gradients_that_are_all_zero_stop_and_a_single_value_suffices():
    zeros = [("first", torch.zeros(2)), ("second", torch.zeros(3))]
    with pytest.raises(ToolkitError, match="all gradients are zero"):
        check_gradients(zeros)
    check_gradients([*zeros, ("third", torch.tensor([0.0, 1e-20]))])


def test_a_disk_without_room_is_refused_with_needed_and_free(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=2 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    check_disk(str(tmp_path), 2 * 2**30)
    with pytest.raises(
        ToolkitError, match=r"2\.0 GiB are free.* this run need 3\.0 GiB .*save_dir"
    ):
        check_disk(str(tmp_path), 3 * 2**30)


def test_checkpoints_that_will_be_replaced_count_as_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    for name in ("best", "last/deep", "resume", "other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_bytes(bytes(200_000))
    check_disk(str(tmp_path), 600_000)
    with pytest.raises(ToolkitError, match="are free"):
        check_disk(str(tmp_path), 800_000)


def settings_of(*, lora=False, bits=None, **train):
    groups = (
        TrainSettings(model_name_or_path="w", **train),
        DataSettings(),
        ModelSettings(quantization_bit=bits),
        LoraSettings(with_lora=lora),
        AdaLoraSettings(),
    )
    return Settings(*groups)


def advice(**options):
    return out_of_memory_advice(settings_of(**options))


def test_a_full_card_is_one_line_with_its_size_and_the_advice():
    room = "CUDA out of memory. Tried to allocate 1 GiB. GPU 0 has 79 GiB of which 4 MiB is free."
    told = f"{room} Process 7 has 1 GiB in use. Including non-PyTorch memory, more.\nA second line"
    with pytest.raises(ToolkitError) as caught, explaining_memory(settings_of()):
        raise torch.OutOfMemoryError(told)
    assert str(caught.value) == f"{room} {advice()}"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"train_batch_size": 8, "gradient_accumulation_steps": 3},
            ["train LoRA", "gradient_checkpointing full",
             "train_batch_size 4 and gradient_accumulation_steps 6", "paged_adamw_8bit",
             "max_seq_length 1024", "deepspeed"],
        ),
        (
            {"lora": True, "train_batch_size": 1},
            ["hold the frozen weights in int4", "gradient_checkpointing", "max_seq_length",
             "deepspeed"],
        ),
        (
            {"lora": True, "bits": 4, "train_batch_size": 2, "gradient_checkpointing": "full"},
            ["train_batch_size 1 and gradient_accumulation_steps 2", "max_seq_length", "deepspeed"],
        ),
        (
            {"gradient_checkpointing": "full", "train_batch_size": 1, "optimizer": "adamw_8bit",
             "enable_deepspeed": True},
            ["train LoRA", "max_seq_length"],
        ),
    ],
)  # fmt: skip
def test_advice_on_memory_is_numbered_by_effect_and_names_only_what_is_left_to_do(
    options, expected
):
    found = re.split(r"(?:; )?\(\d\) ", advice(**options))
    assert found[0] == "in the order of effect: "
    assert len(found) == 1 + len(expected), found
    for text, part in zip(found[1:], expected, strict=True):
        assert part in text
