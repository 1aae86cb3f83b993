"""What a training leaves is whole, is read back and checked, and loads as what was trained."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm.building import load_for_inference
from chatglm.checkpoints import check_saved, save_trained
from chatglm.errors import ToolkitError
from chatglm.files import recover_folder, replace_folder
from chatglm.saved import kind_of, read_settings_json
from chatglm.sharding import whole_state
from chatglm.tokenizer import ChatGLMTokenizer
from chatglm.tuning import prompt

from .conftest import WEIGHTS, write_config
from .tiny_weights import (
    METHODS,
    QUANTIZED,
    arithmetic,
    batch,
    build,
    every_pair,
    logits,
    settings,
    train_adalora,
    with_equal_head,
    with_tokenizer,
)

FILE = {"full": "model", "freeze": "model", "ptuning": "prefix_encoder", "lora": "adapter_model",
        "adalora": "adapter_model"}  # fmt: skip


class Trained:
    """A model of a few steps, and its folder."""

    def __init__(self, base, folder, method, **options):
        self.folder, self.chosen = folder, settings(base, method, **options)
        self.model = build(self.chosen)
        self.path = folder / f"{FILE[self.chosen.method]}.safetensors"
        self.tokenizer = ChatGLMTokenizer(str(base / "ice_text.model"))

    def save(self):
        state = whole_state(self.model)
        save_trained(self.model, state, self.chosen, str(self.folder), tokenizer=self.tokenizer)
        return self

    def check(self):
        with arithmetic(self.chosen):
            check_saved(self.model, whole_state(self.model), self.chosen, str(self.folder), batch())

    def load(self, **options):
        return load_for_inference(str(self.folder), device="cpu", **options)[0]

    def edit(self, change):
        state = load_file(self.path)
        change(state)
        save_file(state, self.path)


# A round trip


@pytest.mark.parametrize(("method", "held"), every_pair())
def test_a_saved_folder_computes_what_the_trained_model_does(
    weights_folder, tmp_path, method, held
):
    run = Trained(weights_folder, tmp_path / "last", method, model=QUANTIZED.get(held)).save()
    run.check()
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    assert read_settings_json(str(run.folder)) == json.loads(run.chosen.as_json())
    assert torch.equal(logits(run.load()), logits(run.model))


@pytest.mark.parametrize(("method", "bits"), [("ptuning", 8), ("rslora", 4)])
def test_a_round_trip_over_the_released_packed_weights_is_exact(
    tmp_path, quantized_folders, method, bits
):
    base = with_tokenizer(quantized_folders[bits], tmp_path / "packed")
    run = Trained(base, tmp_path / "last", method).save()
    run.check()
    assert torch.equal(logits(run.load()), logits(run.model))


@pytest.mark.parametrize("trained_precision", ["32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_training_in_bf16_is_read_back_within_its_rounding(
    weights_folder, tmp_path, method, trained_precision
):
    options = {"precision": "bf16", "trained_precision": trained_precision}
    run = Trained(weights_folder, tmp_path / "last", method, train=options).save()
    run.check()
    expected = logits(run.model, run.chosen)
    assert (logits(run.load()) - expected).abs().max() < 0.05 * expected.abs().max()
    dtypes = {tensor.dtype for tensor in load_file(run.path).values()}
    bf16 = run.chosen.method in ("full", "freeze") or trained_precision == "bf16"
    assert dtypes == {torch.bfloat16 if bf16 else torch.float32}


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_holds_what_was_trained_and_no_more(weights_folder, tmp_path, method):
    run = Trained(weights_folder, tmp_path / "last", method).save()
    trained = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    if run.chosen.method == "freeze":
        trained = dict(run.model.named_parameters())
    stored = load_file(run.path)
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in trained.values())
    kinds = {"model": "weights", "prefix_encoder": "prefix", "adapter_model": "adapter"}
    assert kind_of(str(run.folder)) == kinds[run.path.stem]


@pytest.mark.parametrize(
    ("steps", "schedule", "rows"),
    [
        (6, {"tinit": 1, "tfinal": 1, "deltaT": 5}, 2 * 4),  # cut at 5, grown again at 6
        (10, {"tinit": 2, "tfinal": 4}, 2 * 2),
        (12, {"tinit": 2, "tfinal": 4, "deltaT": 3}, 2 * 2),
    ],
)
def test_adalora_is_read_back_in_the_midst_of_its_schedule_and_with_its_final_ranks(
    weights_folder, tmp_path, steps, schedule, rows
):
    run = Trained(weights_folder, tmp_path / "last", "adalora", adalora=schedule)
    train_adalora(run.model, run.chosen, steps)
    pattern = dict(run.model.peft_config["default"].rank_pattern)
    run.save().check()
    assert run.model.peft_config["default"].rank_pattern == pattern
    assert sum(len(t) for n, t in load_file(run.path).items() if "lora_E" in n) == rows
    assert (logits(run.load()) - logits(run.model)).abs().max() < 1e-5


def test_a_tied_head_is_saved_and_checked(tmp_path, weights_folder):
    base = with_equal_head(weights_folder, tmp_path / "tied", tie_word_embeddings=True)
    run = Trained(base, tmp_path / "last", "full").save()
    run.check()
    assert torch.equal(logits(run.load()), logits(run.model))


# Reading back finds damage


def zeroed(state):
    name = max(name for name in state if state[name].any())
    state[name] = torch.zeros_like(state[name])


def one_bit(state):
    state[min(state)].view(torch.uint8).view(-1)[0] ^= 1


def missing(state):
    del state[max(state)]


def surplus(state):
    state["transformer.layers.9.mlp.dense.weight"] = torch.zeros(1)


@pytest.mark.parametrize("damage", [zeroed, one_bit, missing, surplus])
@pytest.mark.parametrize(
    ("method", "precision"), [("full", "bf16"), *((method, "32") for method in METHODS)]
)
def test_reading_back_finds_a_tensor_that_is_not_what_was_saved(
    weights_folder, tmp_path, method, damage, precision
):
    run = Trained(weights_folder, tmp_path / "last", method, train={"precision": precision})
    run.save().edit(damage)
    with pytest.raises(ToolkitError, match=f"{run.folder}.*: read back, .*(not what|missing)"):
        run.check()


@pytest.mark.parametrize("method", ["full", "ptuning", "rslora"])
def test_reading_back_finds_a_file_cut_short(weights_folder, tmp_path, method):
    run = Trained(weights_folder, tmp_path / "last", method).save()
    run.path.write_bytes(run.path.read_bytes()[:-8])
    with pytest.raises(ToolkitError, match=f"{run.path}: can't be read"):
        run.check()


def test_reading_back_finds_a_wrong_scale_beside_right_tensors(weights_folder, tmp_path):
    run = Trained(weights_folder, tmp_path / "last", "rslora").save()
    path = run.folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"use_rslora": true', '"use_rslora": false'))
    with pytest.raises(ToolkitError, match=f"{run.folder}: read back, its logits differ by"):
        run.check()


def test_reading_back_leaves_the_model_as_it_was(weights_folder, tmp_path):
    for method in ("full", "ptuning", "biases"):
        run = Trained(weights_folder, tmp_path / method, method).save()
        before = {n: (p.data_ptr(), p.clone()) for n, p in run.model.named_parameters()}
        run.model.train()
        run.check()
        assert run.model.training
        for name, parameter in run.model.named_parameters():
            pointer, value = before[name]
            assert parameter.data_ptr() == pointer and torch.equal(parameter, value), name


# Nothing half-written


@pytest.mark.parametrize("method", ["full", "ptuning", "rslora"])
def test_a_save_that_fails_leaves_the_older_folder(weights_folder, tmp_path, monkeypatch, method):
    run = Trained(weights_folder, tmp_path / "last", method).save()
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("chatglm.run_settings.Settings.as_json", fail)
    with pytest.raises(OSError, match="disk full"):
        run.save()
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before
    monkeypatch.undo()
    run.save()
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def write(folder, text):
    folder.mkdir()
    (folder / "file").write_text(text)
    return str(folder)


def killed_at(call, monkeypatch):
    """os.replace that raises in place of its call of this number."""
    calls, replace = [], os.replace

    def killed(*paths):
        calls.append(paths)
        if len(calls) == call:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr("chatglm.weights.os.replace", killed)


@pytest.mark.parametrize("call", [1, 2])
def test_a_kill_while_a_folder_is_replaced_leaves_the_older_one(
    tmp_path, monkeypatch, capsys, call
):
    folder = write(tmp_path / "last", "old")
    killed_at(call, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(write(tmp_path / "new", "new"), folder)
    monkeypatch.undo()
    recover_folder(folder)
    assert (tmp_path / "last" / "file").read_text() == "old"
    assert ("the one saved before it is back" in capsys.readouterr().out) == (call == 2)
    replace_folder(str(tmp_path / "new"), folder)
    assert (tmp_path / "last" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_second_kill_before_the_first_is_mended_leaves_the_older_folder_too(
    tmp_path, monkeypatch
):
    folder = write(tmp_path / "last", "old")
    for call, name in ((2, "one"), (1, "two")):
        killed_at(call, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            replace_folder(write(tmp_path / name, "new"), folder)
        monkeypatch.undo()
    recover_folder(folder)
    assert (tmp_path / "last" / "file").read_text() == "old"


@pytest.mark.parametrize("method", ["full", "ptuning", "rslora"])
def test_a_chat_finds_the_folder_that_a_kill_left_aside(weights_folder, tmp_path, method):
    run = Trained(weights_folder, tmp_path / "last", method).save()
    for name in ("last", "last/"):
        run.folder.rename(tmp_path / "last.old")
        model, _ = load_for_inference(f"{tmp_path}/{name}", device="cpu")
        assert torch.equal(logits(model), logits(run.model))


# Other people's checkpoints


@pytest.fixture
def golden_base(tmp_path, checkpoint_folder):
    return with_tokenizer(checkpoint_folder, tmp_path / "base")


def golden_prefix(golden_folder, projection):
    """Expected numbers, and the encoder as the released training saves it."""
    name = "prefix_projection" if projection else "prefix_embedding"
    expected = load_file(golden_folder / f"{name}.safetensors")
    state = {n.removeprefix("state."): t for n, t in expected.items() if n.startswith("state.")}
    return expected, state


@torch.no_grad()
def golden_distance(model, golden, expected):
    found = model(input_ids=golden["single.input_ids"]).logits
    return (found - expected["single.logits"]).abs().max()


def test_a_lora_adapter_of_the_released_time_answers_with_the_released_numbers(
    golden, golden_folder, golden_base
):
    folder = str(golden_folder / "lora_adapter")
    model, _ = load_for_inference(folder, base=str(golden_base), device="cpu")
    assert golden_distance(model, golden, load_file(golden_folder / "lora.safetensors")) < 1e-4


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_encoder_alone_in_a_bin_answers_with_the_released_numbers(
    golden, golden_folder, golden_base, tmp_path, projection
):
    expected, state = golden_prefix(golden_folder, projection)
    folder = tmp_path / "checkpoint-3000"
    folder.mkdir()
    torch.save(state, folder / WEIGHTS)
    write_config(folder, pre_seq_len=6, prefix_projection=projection)
    assert kind_of(str(folder)) == "prefix"
    model, _ = load_for_inference(str(folder), base=str(golden_base), device="cpu")
    assert golden_distance(model, golden, expected) < 1e-4


@pytest.mark.parametrize("projection", [False, True])
def test_a_bin_of_all_weights_with_the_prefix_encoder_answers_with_the_released_numbers(
    golden, golden_folder, golden_base, released_state, projection
):
    expected, state = golden_prefix(golden_folder, projection)
    torch.save({**released_state, **state}, golden_base / WEIGHTS)
    write_config(golden_base, pre_seq_len=6, prefix_projection=projection)
    assert kind_of(str(golden_base)) == "weights"
    model, _ = load_for_inference(str(golden_base), device="cpu")
    assert golden_distance(model, golden, expected) < 1e-4


# Loading is strict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(f"{prompt.PREFIX}embedding.weight"), "no tensor .*embedding"),
        (lambda state: state.pop(f"{prompt.PREFIX}trans.2.bias"), r"trans\.2\.bias missing"),
        (
            lambda state: state.update({f"{prompt.PREFIX}trans.4.bias": torch.zeros(1)}),
            r"trans\.4\.bias surplus",
        ),
        (
            lambda state: state.update({f"{prompt.PREFIX}embedding.weight": torch.ones(3, 7)}),
            r"embedding\.weight \[3, 7\] != \[3, 64\]",
        ),
    ],
)
def test_a_prefix_encoder_that_does_not_fit_is_refused_by_name(
    weights_folder, tmp_path, change, message
):
    run = Trained(weights_folder, tmp_path / "last", "projection")
    run.save().edit(change)
    with pytest.raises(ToolkitError, match=f"{run.path}: .*{message}"):
        run.load()


def test_a_prefix_encoder_of_a_deeper_model_is_refused(weights_folder, tmp_path, golden_base):
    run = Trained(weights_folder, tmp_path / "last", "ptuning").save()
    with pytest.raises(ToolkitError, match=r"embedding\.weight \[3, 256\] != \[3, 3584\]"):
        run.load(base=str(golden_base))


@pytest.mark.parametrize("method", ["full", "ptuning", "rslora"])
def test_a_damaged_file_is_named_when_it_is_loaded(weights_folder, tmp_path, method):
    run = Trained(weights_folder, tmp_path / "last", method).save()
    run.path.write_bytes(run.path.read_bytes()[:-8])
    with pytest.raises(ToolkitError, match=f"{run.folder}.*: "):
        run.load()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04"])
def test_a_damaged_bin_is_named(tmp_path, golden_base, content):
    (golden_base / WEIGHTS).write_bytes(content)
    with pytest.raises(ToolkitError, match=f"{golden_base / WEIGHTS}: can't be read"):
        kind_of(str(golden_base))


def test_a_folder_of_nothing_and_no_folder_are_told_apart(tmp_path):
    with pytest.raises(ToolkitError, match=re.escape(f"{tmp_path}: neither weights")):
        kind_of(str(tmp_path))
    with pytest.raises(ToolkitError, match="absent: no such folder; train first"):
        kind_of(str(tmp_path / "absent"))


def test_settings_that_are_not_json_are_named(tmp_path):
    assert read_settings_json(str(tmp_path)) == {}
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ToolkitError, match=r"settings\.json: not readable as JSON"):
        read_settings_json(str(tmp_path))
