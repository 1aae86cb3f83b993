"""Folders of weights: what is missing is named, and a save is whole or not at all."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from chatglm.configuration import ChatGLMConfig
from chatglm.corpus import read_paragraphs
from chatglm.errors import ToolkitError
from chatglm.model import ChatGLMForConditionalGeneration
from chatglm.saved import read_settings_json
from chatglm.tokenizer import train_tokenizer
from chatglm.weights import (
    _usual_dtype,
    check_tokenizer,
    choose_device,
    find_folder,
    load_config,
    load_pretrained,
    save_folder,
)

DATA = Path(__file__).parents[1] / "data" / "finetune_train_examples.json"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [text for rounds in read_paragraphs([str(DATA)]) for pair in rounds for text in pair]
    return train_tokenizer(texts, str(tmp_path_factory.mktemp("pieces")), vocab_size=2432)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ChatGLMForConditionalGeneration(tiny()).eval()


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    save(model, tokenizer, '{"seed": 1}', tmp_path / "saved")
    return tmp_path / "saved"


def save(model, tokenizer, settings, folder, dtype=torch.float32):
    save_folder(model, model.state_dict(), tokenizer, settings, str(folder), dtype=dtype)


def tiny(**changes):
    options = {
        "vocab_size": 2432, "hidden_size": 32, "inner_hidden_size": 64, "num_layers": 2,
        "num_attention_heads": 4, "max_sequence_length": 64, "bos_token_id": 7, "eos_token_id": 8,
        "mask_token_id": 4, "gmask_token_id": 6, "pad_token_id": 3,
    }  # fmt: skip
    return ChatGLMConfig(**{**options, **changes})


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_saved_folder_loads_to_the_same_logits_and_pieces(folder, model, tokenizer):
    loaded, pieces = load_pretrained(str(folder), device="cpu")
    ids = torch.tensor([tokenizer.encode_prompt("从南京到上海的路线")])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert pieces.encode_prompt("你好\n  世界") == tokenizer.encode_prompt("你好\n  世界")
    assert not loaded.training and loaded.dtype == torch.float32


def test_a_saved_folder_holds_all_that_a_chat_needs(folder):
    names = {"model.safetensors", "config.json", "ice_text.model", "settings.json"}
    assert names <= {path.name for path in folder.iterdir()}
    assert read_settings_json(str(folder)) == {"seed": 1}
    assert read_settings_json(str(folder.parent)) == {}
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


def test_a_save_over_an_older_folder_replaces_it(folder, model, tokenizer):
    (folder / "left over").write_text("")
    save(model, tokenizer, '{"seed": 2}', folder)
    assert read_settings_json(str(folder)) == {"seed": 2}
    assert not (folder / "left over").exists()


@pytest.mark.parametrize("failing", ["model", "tokenizer"])
def test_a_save_that_fails_midway_leaves_the_old_folder(
    folder, model, tokenizer, monkeypatch, failing
):
    def fail(self, path, **options):
        Path(path).mkdir(exist_ok=True)
        (Path(path) / "model.safetensors").write_text("half")
        raise OSError("disk full")

    before = files(folder)
    monkeypatch.setattr(type({"model": model, "tokenizer": tokenizer}[failing]),
                        "save_pretrained", fail)  # fmt: skip
    with pytest.raises(OSError, match="disk full"):
        save(model, tokenizer, "{}", folder)
    assert files(folder) == before
    monkeypatch.undo()
    save(model, tokenizer, '{"seed": 3}', folder)
    assert read_settings_json(str(folder)) == {"seed": 3}


@pytest.mark.parametrize("name", ["config.json", "ice_text.model", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ToolkitError, match=f"missing .*{name}"):
        find_folder(str(folder))


def test_a_missing_shard_is_named(folder):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ToolkitError, match=r"missing two\.safetensors$"):
        find_folder(str(folder))


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_an_unreadable_index_is_a_toolkit_error(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ToolkitError, match=r"index\.json"):
        find_folder(str(folder))


@pytest.mark.parametrize("path", ["./absent", "/no/such/folder", "absent", "a/b/c"])
def test_a_path_that_is_no_folder_is_named(path):
    with pytest.raises(ToolkitError, match=f"{path}: no such folder"):
        find_folder(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "config.json"),
        ("{}", "config.json"),
        ("[]", "config.json"),
        ('{"model_type": "bert"}', "bert"),
        ('{"model_type": "chatglm", "vocab_size": 150528}', "150528"),
        ('{"model_type": "chatglm", "hidden_size": 34, "num_attention_heads": 4}', "34"),
        ('{"model_type": "chatglm", "quantization_bit": 3}', "3"),
        ('{"model_type": "chatglm", "hidden_size": "wide"}', "hidden_size"),
    ],
)
def test_a_config_that_is_not_this_models_is_a_toolkit_error(tmp_path, content, named):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ToolkitError, match=named):
        load_config(str(path))


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(ToolkitError, match=r"absent\.json"):
        load_config(str(tmp_path / "absent.json"))


def test_the_tokenizer_of_another_model_is_refused_with_the_ids(tokenizer):
    config = tiny(bos_token_id=90, eos_token_id=91, vocab_size=100)
    with pytest.raises(ToolkitError) as caught:
        check_tokenizer(tokenizer, config, "here")
    message = str(caught.value)
    for part in ("here", "<sop> is 7", "says 90", "<eop> is 8", "says 91", "100 embedding rows"):
        assert part in message
    assert "gMASK" not in message
    check_tokenizer(tokenizer, tiny(), "here")


def test_a_folder_with_the_wrong_tokenizer_is_refused_before_the_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "gmask_token_id": 99}))
    (folder / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(ToolkitError, match=r"\[gMASK\] is 6 .* 99"):
        load_pretrained(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "ice_text.model", "settings.json"])
def test_a_damaged_file_is_a_toolkit_error(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ToolkitError, match=name):
        load_pretrained(str(folder), device="cpu")
        read_settings_json(str(folder))


def test_a_weight_of_a_wrong_shape_or_absent_is_a_toolkit_error(folder):
    config = json.loads((folder / "config.json").read_text())
    for change in ({"inner_hidden_size": 128}, {"num_layers": 3}):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ToolkitError):
            load_pretrained(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["cuda:99", "abacus", "", "cpu:x"])
def test_a_device_that_is_not_here_is_named(name):
    with pytest.raises(ToolkitError, match=f"'{name}'"):
        choose_device(name)


def test_cpu_is_always_a_device():
    assert choose_device("cpu") == torch.device("cpu")


def test_a_folder_without_tokenizer_config_loads(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer_config.json").unlink()
    _, pieces = load_pretrained(str(tmp_path / "bare"), device="cpu")
    assert pieces.bos_token_id == 7


def test_a_hub_name_comes_from_modelscope_where_its_package_is(monkeypatch, tmp_path):
    asked = []
    hub = types.ModuleType("modelscope")
    hub.snapshot_download = lambda name: asked.append(name) or str(tmp_path)
    monkeypatch.setitem(sys.modules, "modelscope", hub)
    with pytest.raises(ToolkitError, match=r"missing config\.json"):
        find_folder("THUDM/chatglm-6b")
    assert asked == ["THUDM/chatglm-6b"]


@pytest.mark.parametrize(
    ("layers", "packed", "multiplies", "dtype"),
    [
        (28, True, True, torch.bfloat16),
        (28, False, True, torch.float32),
        (1, True, True, torch.float32),
        (28, True, False, torch.float32),
    ],
)
def test_large_packed_weights_run_in_bf16_on_a_cpu_that_multiplies_it(
    monkeypatch, layers, packed, multiplies, dtype
):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: multiplies)
    config = ChatGLMConfig(num_layers=layers)
    assert _usual_dtype(torch.device("cpu"), config, packed) == dtype
    assert _usual_dtype(torch.device("cuda"), config, packed) is None
