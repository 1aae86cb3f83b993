"""Head and embedding: one tensor where they are equal and only read, two in every file."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from chatglm.building import build_model, load_for_inference
from chatglm.checkpoints import check_saved, save_trained
from chatglm.errors import ToolkitError
from chatglm.sharding import whole_state
from chatglm.tuning.adapters import load_adapters, merge_adapter, plain_model
from chatglm.tying import EMBEDDING, HEAD, is_shared, part_head, share_head
from chatglm.weights import describe, load_config, load_model, load_tokenizer, save_folder

from .conftest import load
from .tiny_weights import (
    METHODS,
    QUANTIZED,
    batch,
    build,
    gradients,
    logits,
    settings,
    with_equal_head,
)

SEPARATE = ("full", "freeze")


@pytest.fixture(scope="module")
def equal_folder(weights_folder, tmp_path_factory):
    """Weights whose stored head is their embedding. Tests leave it as they found it."""
    return with_equal_head(weights_folder, tmp_path_factory.mktemp("equal") / "weights")


def load_shared(folder, **options):
    config, cpu = load_config(str(folder)), torch.device("cpu")
    options = {"dtype": torch.float32, "device": cpu, **options}
    return load_model(str(folder), config, **options).eval()


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


# In memory


@pytest.mark.parametrize("held", [{}, *QUANTIZED.values()], ids=["whole", *QUANTIZED])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_an_equal_head_takes_no_memory_of_its_own(equal_folder, held, dtype):
    names = {"load_in_8bit": {"bitsandbytes_bits": 8}, "load_in_4bit": {"bitsandbytes_bits": 4}}
    if not names.keys().isdisjoint(held):
        pytest.importorskip("bitsandbytes")
    options = {"dtype": dtype, **names.get(next(iter(held), ""), held)}
    shared, apart = (load_shared(equal_folder, one_head=o, **options) for o in (True, False))
    assert is_shared(shared) and not is_shared(apart)
    one, two = (describe(model, "here") for model in (shared, apart))
    assert one.count("head and embedding are one") == 1 and "are one" not in two
    assert count(apart) - count(shared) == 320 * 64
    assert torch.equal(logits(shared), logits(apart))


def test_a_head_that_differs_stays_as_it_is(weights_folder):
    model = load_shared(weights_folder)
    assert not is_shared(model)
    assert torch.equal(logits(model), logits(load(weights_folder)))


@pytest.mark.parametrize("at", [0, -1])
def test_one_value_makes_a_head_differ(equal_folder, monkeypatch, at):
    monkeypatch.setattr("chatglm.tying.ROWS_COMPARED", 7)
    model = load(equal_folder)
    with torch.no_grad():
        model.lm_head.weight[at, at] += 0.5
    assert not share_head(model) and not is_shared(model)


@pytest.mark.parametrize("method", METHODS)
def test_training_shares_the_head_unless_it_trains_it(equal_folder, method):
    model = plain_model(build(settings(equal_folder, method), nudged=False))
    own = method in SEPARATE or method == "saved modules"
    assert is_shared(model) != own
    if method == "saved modules":  # the frozen original below the trained copy
        assert model.lm_head.original_module.weight is model.transformer.word_embeddings.weight


@pytest.mark.parametrize("method", ["ptuning", "lora", "adalora"])
def test_a_shared_head_changes_no_gradient(equal_folder, method):
    chosen = settings(equal_folder, method)
    model = build(chosen)
    found = gradients(model, chosen)
    part_head(plain_model(model))
    for name, gradient in gradients(model, chosen).items():
        assert name.endswith(HEAD) or (gradient is None) == (found[name] is None), name
        assert gradient is None or torch.equal(gradient, found[name]), name


def test_the_precision_of_a_shared_head_is_that_of_the_embedding(equal_folder):
    model = load_shared(equal_folder).to(torch.bfloat16).half()
    assert is_shared(model) and model.lm_head.weight.dtype == torch.float16


# In files


@pytest.mark.parametrize("held", ["whole", "int4", "nf4"])
def test_a_shared_head_is_saved_as_a_tensor_of_its_own(equal_folder, tmp_path, held):
    options = {"int4": {"quantization_bit": 4}, "nf4": {"bitsandbytes_bits": 4}}.get(held, {})
    if held == "nf4":
        pytest.importorskip("bitsandbytes")
    model = load_shared(equal_folder, **options)
    model.save_pretrained(tmp_path)
    assert is_shared(model)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored[HEAD], stored[EMBEDDING])
    again = load_shared(tmp_path, one_head=False)
    assert not is_shared(again) and torch.equal(logits(again), logits(model))


def test_a_state_dict_of_a_shared_head_is_saved_whole(equal_folder, tmp_path):
    model, tokenizer = load_shared(equal_folder), load_tokenizer(str(equal_folder))
    names = model.state_dict().keys()
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    state = model.state_dict()
    save_folder(model, state, tokenizer, "{}", str(tmp_path / "own"), dtype=torch.float32)
    for folder in ("given", "own"):
        assert load_file(tmp_path / folder / "model.safetensors").keys() == names
        assert torch.equal(logits(load(tmp_path / folder)), logits(model))


# Trained as one


def trained_in_full(folder, target, **model):
    chosen = settings(folder, "full", model=model)
    model = build(chosen)
    state, tokenizer = whole_state(model), load_tokenizer(str(folder))
    save_trained(model, state, chosen, str(target), tokenizer=tokenizer)
    check_saved(model, state, chosen, str(target), batch())
    return model, chosen


def test_full_training_moves_head_and_embedding_apart(equal_folder, tmp_path):
    model, _ = trained_in_full(equal_folder, tmp_path / "last")
    stored = load_file(tmp_path / "last" / "model.safetensors")
    assert not torch.equal(stored[HEAD], stored[EMBEDDING])
    assert torch.equal(logits(load(tmp_path / "last")), logits(model))


@pytest.mark.parametrize("said_in", ["settings", "config.json"])
def test_tied_word_embeddings_train_as_one_parameter(weights_folder, tmp_path, said_in):
    tied = {"tie_word_embeddings": True}
    config, switch = (tied, {}) if said_in == "config.json" else ({}, tied)
    folder = with_equal_head(weights_folder, tmp_path / "weights", **config)
    model, chosen = trained_in_full(folder, tmp_path / "last", **switch)
    assert is_shared(model) and HEAD not in dict(model.named_parameters())
    one = gradients(model, chosen)[EMBEDDING].clone()
    part_head(model)
    both = gradients(model, chosen)
    assert torch.allclose(one, both[HEAD] + both[EMBEDDING], atol=1e-6)
    again = load(tmp_path / "last")
    assert is_shared(again) and again.config.tie_word_embeddings
    stored = load_file(tmp_path / "last" / "model.safetensors")
    assert torch.equal(stored[HEAD], stored[EMBEDDING])


def test_tied_weights_train_apart_if_the_settings_say_so(weights_folder, tmp_path):
    folder = with_equal_head(weights_folder, tmp_path / "weights", tie_word_embeddings=True)
    trained_in_full(folder, tmp_path / "last", tie_word_embeddings=False)
    again = load(tmp_path / "last")
    assert not is_shared(again) and not again.config.tie_word_embeddings


def test_new_weights_are_tied_if_the_settings_say_so():
    chosen = settings("", model={"tie_word_embeddings": True})
    config = load_config("./config/config_tiny.json")
    assert is_shared(build_model(chosen, config, total_steps=1))
    assert not config.tie_word_embeddings


def test_freezing_the_embedding_of_a_tied_head_is_refused(weights_folder, tmp_path):
    folder = with_equal_head(weights_folder, tmp_path / "weights", tie_word_embeddings=True)
    with pytest.raises(ToolkitError, match="set tie_word_embeddings false, and they train apart"):
        build(settings(folder, "freeze"))
    model = build(settings(folder, "freeze", model={"tie_word_embeddings": False}))
    assert model.lm_head.weight.requires_grad and not is_shared(model)


@pytest.mark.parametrize("method", ["freeze", "ptuning", "lora", "adalora"])
def test_a_method_that_leaves_head_or_embedding_alone_ties_nothing(weights_folder, method):
    with pytest.raises(ToolkitError, match=r"tie_word_embeddings with .*: head and embedding"):
        settings(weights_folder, method, model={"tie_word_embeddings": True})


def test_a_head_that_differs_is_not_tied(weights_folder):
    with pytest.raises(ToolkitError, match="head and embedding differ, so they can't be one"):
        build(settings(weights_folder, "full", model={"tie_word_embeddings": True}))


# Adapters that change the head or the embedding


@pytest.mark.parametrize("name", ["lm_head", "word_embeddings"])
def test_a_module_to_save_is_trained_without_its_twin(equal_folder, tmp_path, capsys, name):
    chosen = settings(equal_folder, "rslora", lora={"modules_to_save": [name]})
    model = build(chosen)
    assert f"they are two now, as the adapter changes {name}\n" in capsys.readouterr().out
    tokenizer = load_tokenizer(str(equal_folder))
    save_trained(model, whole_state(model), chosen, str(tmp_path / "last"), tokenizer=tokenizer)
    loaded, _ = load_for_inference(str(tmp_path / "last"), device="cpu")
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5
    merged = merge_adapter(loaded).state_dict()
    changed, kept = (HEAD, EMBEDDING) if name == "lm_head" else (EMBEDDING, HEAD)
    before = load(equal_folder).state_dict()[HEAD]
    assert torch.equal(merged[kept], before) and not torch.equal(merged[changed], before)


@pytest.mark.parametrize("target", ["lm_head", "word_embeddings"])
def test_lora_on_one_of_the_two_is_merged_into_that_one(equal_folder, tmp_path, capsys, target):
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["dense", target],
                        init_lora_weights=False)  # fmt: skip
    foreign = get_peft_model(load(equal_folder), config).eval()
    foreign.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = load_adapters(load_shared(equal_folder), {"default": str(tmp_path)})
    assert f"they are two now, as the adapter changes {target}\n" in capsys.readouterr().out
    expected = logits(foreign)
    assert (logits(loaded) - expected).abs().max() < 1e-5
    merged = merge_adapter(loaded)
    assert (logits(merged) - expected).abs().max() < 1e-4
    kept = EMBEDDING if target == "lm_head" else HEAD
    assert torch.equal(merged.state_dict()[kept], load(equal_folder).state_dict()[kept])


def test_an_adapter_on_the_blocks_leaves_the_head_shared(equal_folder, capsys):
    model = build(settings(equal_folder, "lora"))
    assert is_shared(merge_adapter(model)) and "they are two" not in capsys.readouterr().out
