"""What each method trains, over which weights, and adapters: loaded strictly, merged exactly."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm.errors import ToolkitError
from chatglm.quantization.linear import dequantize_packed
from chatglm.sharding import whole_state
from chatglm.tuning.adapters import (
    adapter_ranks,
    describe_adapters,
    load_adapters,
    merge_adapter,
    needs_dequantising,
    save_adapter,
)
from chatglm.tuning.apply import parameter_table
from chatglm.weights import DTYPES, load_pretrained

from .conftest import load
from .tiny_weights import (
    METHODS,
    QUANTIZED,
    SHAPE,
    build,
    every_pair,
    gradients,
    logits,
    settings,
    train_adalora,
    with_tokenizer,
)

LAYERS = ("transformer.layers.0.", "transformer.layers.1.")
QUERY_KEY_VALUE = [f"base_model.model.{layer}attention.query_key_value." for layer in LAYERS]
ADAPTERS = [name for name in METHODS if "lora" in METHODS[name] or "adalora" in METHODS[name]]


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(model, folder):
    save_adapter(model, whole_state(model), str(folder))
    return folder


def adapter(weights_folder, folder, method="lora", **changes):
    """A folder with an adapter that is not new."""
    return save(build(settings(weights_folder, method, **changes)), folder)


def edit(folder, change):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


# What is trained


@pytest.fixture(scope="module")
def plain_names(weights_folder):
    return [name for name, _ in load(weights_folder).named_parameters()]


@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_its_parameters_in_fp32_and_no_others(
    weights_folder, plain_names, method, precision
):
    prefix = "transformer.prefix_encoder."
    matrices = {f"{p}lora_{ab}.default.weight" for p in QUERY_KEY_VALUE for ab in "AB"}
    down = {name.replace("attention.query_key_value", "mlp.dense_4h_to_h") for name in matrices}
    bias = "query_key_value.bias", "query_key_value.base_layer.bias"
    expected = {
        "full": set(plain_names),
        "freeze": {n for n in plain_names if not n.startswith((LAYERS[0], "transformer.word"))},
        "ptuning": {f"{prefix}embedding.weight"},
        "projection": {f"{prefix}embedding.weight"}
        | {f"{prefix}trans.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")},
        "lora": matrices | down,
        "rslora": matrices,
        "dora": matrices
        | {f"{p}lora_magnitude_vector.default.weight" for p in QUERY_KEY_VALUE},
        "biases": matrices
        | {f"base_model.model.{n}".replace(*bias) for n in plain_names if n.endswith("bias")},
        "saved modules": matrices
        | {"base_model.model.lm_head.modules_to_save.default.weight"}
        | {f"base_model.model.transformer.final_layernorm.modules_to_save.default.{kind}"
           for kind in ("weight", "bias")},
        "adalora": {f"{p}lora_{abe}.default" for p in QUERY_KEY_VALUE for abe in "ABE"},
    }[method]  # fmt: skip
    model = build(settings(weights_folder, method, train={"precision": precision}), nudged=False)
    assert trained(model) == expected
    for name, parameter in model.named_parameters():
        of_norm = "layernorm" in name
        dtype = torch.float32 if name in expected or of_norm else DTYPES[precision]
        assert parameter.dtype == dtype, name


def test_biases_of_the_adapted_linears_alone_can_be_trained(weights_folder):
    model = build(settings(weights_folder, "biases", lora={"bias": "lora_only"}), nudged=False)
    biases = {name for name in trained(model) if name.endswith("bias")}
    assert biases == {f"{p}base_layer.bias" for p in QUERY_KEY_VALUE}


@pytest.mark.parametrize("method", METHODS)
def test_trained_precision_bf16_holds_what_is_trained_in_bf16(weights_folder, method):
    options = {"precision": "bf16", "trained_precision": "bf16"}
    model = build(settings(weights_folder, method, train=options))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert all(torch.isfinite(g).all() for g in gradients(model, settings(
        weights_folder, method, train=options)).values() if g is not None)  # fmt: skip


@pytest.mark.parametrize("num_layers", [2, 3])
def test_freezing_every_layer_is_refused_with_what_is_allowed(weights_folder, num_layers):
    chosen = settings(weights_folder, "freeze", model={"global_num_layers_freeze": num_layers})
    with pytest.raises(ToolkitError, match=f"{num_layers} leaves nothing of 2 .* are 0 to 1$"):
        build(chosen)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("lm_haed", "no such module"),
        ("query_key_value", "get an adapter"),
        ("attention", "get an adapter"),
        ("mlp", "quantised"),
    ],
)
@pytest.mark.parametrize("held", QUANTIZED)
def test_a_module_that_cannot_be_trained_in_full_is_refused_with_the_reason(
    weights_folder, held, module, reason
):
    chosen = settings(
        weights_folder, "rslora", lora={"modules_to_save": [module]}, model=QUANTIZED[held]
    )
    with pytest.raises(ToolkitError, match=f"modules_to_save '{module}': .*{reason}"):
        build(chosen)


@pytest.mark.parametrize("method", METHODS)
def test_the_table_counts_every_parameter_once(weights_folder, method):
    model = build(settings(weights_folder, method, train={"precision": "bf16"}), nudged=False)
    *rows, total = parameter_table(model).splitlines()
    counted = {"trained": 0, "frozen": 0}
    for row in rows:
        state, count, dtype, _ = row.split()
        counted[state] += int(count.replace(",", ""))
        assert (state, dtype) != ("trained", "bfloat16")
    own = {True: 0, False: 0}
    for parameter in model.parameters():
        own[parameter.requires_grad] += parameter.numel()
    assert counted == {"trained": own[True], "frozen": own[False]}
    share = own[True] / sum(own.values())
    assert total == (f"trained {own[True]:,} of {sum(own.values()):,} stored values ({share:.3%})")


def test_the_table_of_lora_has_the_papers_count(weights_folder):
    table = parameter_table(build(settings(weights_folder, "rslora"), nudged=False))
    layers, width = SHAPE["num_layers"], SHAPE["hidden_size"]
    assert f"trained {layers * 8 * (width + 3 * width):,} of" in table
    assert "layers.*.attention.query_key_value.lora_A.default.weight" in table


# Every method over every kind of weights


@pytest.mark.parametrize(
    ("method", "held", "precision"),
    [
        (method, held, precision)
        for method, held in every_pair()
        for precision in ("32", "bf16", *["16"][: held == "whole"])
    ],
)
def test_a_step_gives_a_gradient_to_what_is_trained_and_to_nothing_else(
    weights_folder, method, held, precision
):
    chosen = settings(
        weights_folder, method, model=QUANTIZED.get(held), train={"precision": precision}
    )
    model = build(chosen)
    found = gradients(model, chosen)
    assert {name for name, gradient in found.items() if gradient is not None} == trained(model)
    for name in trained(model):
        assert torch.isfinite(found[name]).all() and found[name].any(), name


@pytest.mark.parametrize(
    ("method", "bits"), [("ptuning", 8), ("ptuning", 4), ("rslora", 8), ("adalora", 4)]
)
def test_a_step_over_the_released_packed_weights_gives_gradients_too(
    tmp_path, quantized_folders, method, bits
):
    chosen = settings(with_tokenizer(quantized_folders[bits], tmp_path / "packed"), method)
    model = build(chosen)
    found = gradients(model, chosen)
    assert {name for name, gradient in found.items() if gradient is not None} == trained(model)
    assert all(torch.isfinite(found[n]).all() and found[n].any() for n in trained(model))


@pytest.mark.parametrize("held", QUANTIZED)
def test_gradients_through_packed_weights_are_those_through_their_values(weights_folder, held):
    chosen = settings(weights_folder, "lora", model=QUANTIZED[held])
    model = build(chosen)
    packed = {n: g.clone() for n, g in gradients(model, chosen).items() if g is not None}
    base = model.unload()
    if held in ("int8", "int4"):
        dequantize_packed(base, torch.float32)
    else:
        base.dequantize(torch.float32)
    plain_base = base.state_dict()
    again = build(settings(weights_folder, "lora"))
    with torch.no_grad():
        for name, parameter in again.get_base_model().named_parameters():
            if "lora_" not in name:
                parameter.copy_(plain_base[name.replace(".base_layer", "")])
    plain = gradients(again, chosen)
    for name, gradient in packed.items():
        assert (gradient - plain[name]).norm() < 1e-5 * plain[name].norm(), name


@pytest.mark.parametrize("held", QUANTIZED)
def test_an_answer_in_between_leaves_the_gradients_of_training_as_they_were(weights_folder, held):
    chosen = settings(weights_folder, "lora", model=QUANTIZED[held])
    model = build(chosen)
    before = {n: g.clone() for n, g in gradients(model, chosen).items() if g is not None}
    logits(model)
    for name, gradient in gradients(model, chosen).items():
        assert gradient is None or torch.equal(gradient, before[name]), name


@pytest.mark.parametrize("held", QUANTIZED)
def test_training_in_bf16_packs_the_same_bits_as_chat_in_fp32(weights_folder, held):
    model = build(settings(weights_folder, "rslora", model=QUANTIZED[held],
                           train={"precision": "bf16"}))  # fmt: skip
    switches = QUANTIZED[held]
    bits = 8 if "load_in_8bit" in switches else 4 if "load_in_4bit" in switches else 0
    chat, _ = load_pretrained(str(weights_folder), device="cpu", bitsandbytes_bits=bits,
                              quantization_bit=switches.get("quantization_bit", 0))  # fmt: skip
    trained_on = model.unload().state_dict()
    packed = {n: t for n, t in chat.state_dict().items() if "layers" in n and "norm" not in n
              and not n.endswith("bias") and "quant_state" not in n}  # fmt: skip
    assert len(packed) >= 2 * 4
    for name, tensor in packed.items():
        assert torch.equal(tensor, trained_on[name]), name


@pytest.mark.parametrize("held", ["bnb int8", "nf4"])
def test_bitsandbytes_leaves_the_head_and_the_virtual_tokens_whole(weights_folder, held):
    chosen = settings(weights_folder, "projection", model=QUANTIZED[held])
    model = build(chosen)
    kept = [n for n, p in model.named_parameters() if p.dim() > 1 and p.is_floating_point()]
    assert {name.split(".")[-2] for name in kept} == {
        "word_embeddings", "embedding", "0", "2", "lm_head"
    }  # fmt: skip
    assert needs_dequantising(model)


# AdaLoRA


def test_adalora_cuts_its_ranks_to_the_target_on_average(weights_folder, tmp_path):
    chosen = settings(weights_folder, "adalora", adalora={"tinit": 2, "tfinal": 4})
    model = build(chosen)
    sums = train_adalora(model, chosen, 10)
    assert sums == sorted(sums, reverse=True)
    assert sums[0] == 2 * 4 and sums[-1] == 2 * 2
    stored = load_file(save(model, tmp_path / "adapter") / "adapter_model.safetensors")
    kept = {n: len(t) for n, t in stored.items() if "lora_E" in n}
    ranks = {f"base_model.model.{n}.lora_E": rank for n, rank in adapter_ranks(model).items()}
    assert kept == ranks
    assert "ADALORA, rank 2, on query_key_value" in describe_adapters(
        load_adapters(load(weights_folder), {"default": str(tmp_path / "adapter")})
    )


def test_adalora_of_final_ranks_trains_on_after_it_was_saved(weights_folder, tmp_path):
    chosen = settings(weights_folder, "adalora", adalora={"tinit": 2, "tfinal": 4})
    saved, other = build(chosen), build(chosen)
    for model in (saved, other):
        train_adalora(model, chosen, 9)
    save(saved, tmp_path / "adapter")
    for model in (saved, other):
        gradients(model, chosen)
        model.base_model.update_and_allocate(10)
    assert adapter_ranks(saved) == adapter_ranks(other)
    assert torch.equal(logits(saved), logits(other))


@pytest.mark.parametrize(
    "schedule", [{"tinit": 8, "tfinal": 4}, {"tinit": 0, "tfinal": 12}, {"total_step": 3,
                 "tinit": 2, "tfinal": 1}]
)  # fmt: skip
def test_an_adalora_schedule_without_a_step_to_cut_in_is_refused(weights_folder, schedule):
    with pytest.raises(ToolkitError, match="leave no step of total_step"):
        build(settings(weights_folder, "adalora", adalora=schedule), total_steps=12)


def test_the_default_schedule_fits_a_training_of_any_length(weights_folder, capsys):
    for steps in (1, 2, 3, 10, 1000):
        config = build(settings(weights_folder, "adalora"), total_steps=steps).peft_config
        assert config["default"].total_step == steps
        assert config["default"].tinit < steps - config["default"].tfinal
    assert "total_step is" not in capsys.readouterr().out
    build(settings(weights_folder, "adalora", adalora={"total_step": 100}), total_steps=12)
    assert "total_step is 100, this training has 12 steps" in capsys.readouterr().out


# Adapters are loaded strictly


def drop(state):
    del state[min(state)]


def add(state):
    state["base_model.model.transformer.layers.7.attention.query_key_value.lora_A.weight"] = (
        torch.zeros(8, 64)
    )


def reshape(state):
    state[min(state)] = torch.ones(8, 65)


def spoil(state):
    state[next(name for name in state if "lora_A" in name)].view(-1)[0] = float("inf")


def untrain(state):
    for name in state:
        if "lora_B" in name or "lora_E" in name:
            state[name] = torch.zeros_like(state[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"1 missing: .*layers\.0\."),
        (add, r"1 surplus: .*layers\.7\."),
        (reshape, "size mismatch for .*lora_A"),
        (untrain, "never trained: all its lora_[BE] are zero"),
        (spoil, r"not finite: .*lora_"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_an_adapter_that_does_not_fit_or_was_never_trained_is_refused(
    weights_folder, tmp_path, method, change, message
):
    folder = adapter(weights_folder, tmp_path / "adapter", method)
    edit(folder, change)
    with pytest.raises(ToolkitError, match=f"(?s)^{folder}: .*{message}"):
        load_adapters(load(weights_folder), {"default": str(folder)})


@pytest.mark.parametrize("method", ["biases", "saved modules"])
def test_what_is_trained_beside_the_matrices_is_not_left_out_either(
    weights_folder, tmp_path, method
):
    folder = adapter(weights_folder, tmp_path / "adapter", method)
    others = [n for n in load_file(folder / "adapter_model.safetensors") if "lora_" not in n]
    edit(folder, lambda state: state.pop(others[-1]))
    with pytest.raises(ToolkitError, match=re.escape(f"{folder}: ")) as caught:
        load_adapters(load(weights_folder), {"default": str(folder)})
    assert others[-1] in str(caught.value)


def test_an_adapter_of_a_deeper_model_is_refused(weights_folder, tmp_path, checkpoint_folder):
    folder = adapter(weights_folder, tmp_path / "adapter", "rslora")
    with pytest.raises(ToolkitError, match=r"52 missing: .*layers\.10\."):
        load_adapters(load(checkpoint_folder), {"default": str(folder)})


def test_an_adapter_of_another_kind_of_model_is_refused(weights_folder, tmp_path):
    folder = adapter(weights_folder, tmp_path / "adapter", "rslora")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "v_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ToolkitError, match=r"not an adapter of this model .*q_proj"):
        load_adapters(load(weights_folder), {"default": str(folder)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a PEFT adapter's config"),
        ("[]", "not a PEFT adapter's config"),
        ("{}", "peft_type"),
        ('{"peft_type": "PREFIX_TUNING"}', "peft_type 'PREFIX_TUNING'; .* LORA and ADALORA"),
    ],
)
def test_a_config_that_is_no_loras_is_named(weights_folder, tmp_path, content, message):
    folder = adapter(weights_folder, tmp_path / "adapter", "rslora")
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(ToolkitError, match=f"{folder}/adapter_config.json: .*{message}"):
        load_adapters(load(weights_folder), {"default": str(folder)})


def test_a_missing_or_damaged_file_of_an_adapter_is_named(weights_folder, tmp_path):
    folder = adapter(weights_folder, tmp_path / "adapter", "rslora")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ToolkitError, match=f"^{folder}: "):
        load_adapters(load(weights_folder), {"default": str(folder)})
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(ToolkitError, match=f"^{folder}: "):
        load_adapters(load(weights_folder), {"default": str(folder)})
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ToolkitError, match=r"missing adapter_model\.safetensors or"):
        load_adapters(load(weights_folder), {"default": str(folder)})


@pytest.mark.parametrize("name", ["none", "", "a.b", "dense", "weight", "layers", "model"])
def test_a_name_that_would_shadow_a_part_of_the_model_is_refused(weights_folder, tmp_path, name):
    folder = adapter(weights_folder, tmp_path / "adapter", "rslora")
    with pytest.raises(ToolkitError, match=f"{name!r} can't be a name"):
        load_adapters(load(weights_folder), {"default": str(folder), name: str(folder)})


def test_a_dora_adapter_over_released_packed_weights_is_refused(
    weights_folder, tmp_path, quantized_folders
):
    folder = adapter(weights_folder, tmp_path / "adapter", "dora")
    with pytest.raises(ToolkitError, match="DoRA over weights in the released int8 or int4"):
        load_adapters(load(quantized_folders[8]), {"default": str(folder)})


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_several_adapters_answer_as_each_does_alone(weights_folder, tmp_path, method):
    folders = {"default": adapter(weights_folder, tmp_path / "one", method)}
    shutil.copytree(folders["default"], tmp_path / "two")
    folders["law"] = tmp_path / "two"
    edit(folders["law"], lambda state: [t.mul_(-1.5) for t in state.values()])
    alone = {
        name: logits(load_adapters(load(weights_folder), {"default": str(folder)}))
        for name, folder in folders.items()
    }
    model = load_adapters(load(weights_folder), {n: str(f) for n, f in folders.items()})
    assert torch.equal(logits(model), alone["default"])
    model.set_adapter("law")
    assert torch.equal(logits(model), alone["law"])
    assert not torch.equal(alone["law"], alone["default"])
    assert [line.split("'")[1] for line in describe_adapters(model).splitlines()] == [*folders]


# Merging


@pytest.mark.parametrize("method", ADAPTERS)
def test_merged_weights_compute_what_the_adapter_did(weights_folder, tmp_path, method):
    folder = adapter(weights_folder, tmp_path / "adapter", method)
    model = load_adapters(load(weights_folder), {"default": str(folder)})
    expected, bare = logits(model), logits(load(weights_folder))
    assert not needs_dequantising(model)
    merged = merge_adapter(model)
    assert {name for name, _ in merged.named_parameters()} == {
        name for name, _ in load(weights_folder).named_parameters()
    }
    difference = (logits(merged) - expected).abs().max()
    assert difference < 1e-5 < 1e-2 < (expected - bare).abs().max()


@pytest.mark.parametrize(
    ("method", "held"), [(m, h) for m, h in every_pair() if m in ADAPTERS and h != "whole"]
)
def test_merging_into_quantised_weights_takes_their_dequantised_values(
    weights_folder, method, held
):
    model = build(settings(weights_folder, method, model=QUANTIZED[held]))
    assert needs_dequantising(model)
    # In eval mode bitsandbytes' int8 rounds activations as well, on a CPU in training not.
    expected = logits(model, training=held == "bnb int8")
    merged = merge_adapter(model)
    assert {type(m) for m in merged.modules() if isinstance(m, torch.nn.Linear)} == {
        torch.nn.Linear
    }
    assert (logits(merged) - expected).abs().max() < 1e-5


def test_merging_dequantises_packed_embedding_and_head_as_well(tmp_path, write_checkpoint):
    from chatglm.quantization.linear import quantize_rows

    def pack(state):
        for name in [n for n in state if n.endswith("weight") and state[n].dim() == 2]:
            state[name], state[f"{name}_scale"] = quantize_rows(state[name], 8)

    folder = write_checkpoint(pack, quantization_bit=8, quantization_embeddings=True)
    chosen = settings(with_tokenizer(folder, tmp_path / "packed"), "rslora")
    model = build(chosen)
    expected = logits(model)
    merged = merge_adapter(model)
    merged.save_pretrained(tmp_path / "merged")
    assert (logits(load(tmp_path / "merged")) - expected).abs().max() < 1e-4


def test_an_adapter_that_is_not_finite_is_not_merged(weights_folder):
    model = build(settings(weights_folder, "rslora"))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("inf"))
    with pytest.raises(ToolkitError, match="can't be merged: NaNs"):
        merge_adapter(model)
