"""From settings to a model, from a folder to a chat; and the scripts that chat."""

import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import infer
import infer_finetuning
import infer_lora_finetuning
from chatglm.building import (
    build_model,
    build_tokenizer,
    load_for_inference,
    resolve_settings,
)
from chatglm.checkpoints import save_trained
from chatglm.configuration import ChatGLMConfig
from chatglm.errors import ToolkitError
from chatglm.files import read_json
from chatglm.settings import ChatSettings
from chatglm.sharding import whole_state
from chatglm.terminal import converse
from chatglm.tuning.adapters import load_adapters
from chatglm.weights import describe, load_tokenizer
from data_utils import read_settings

from .conftest import load
from .tiny_weights import (
    QUANTIZED,
    SHAPE,
    build,
    every_pair,
    gradients,
    logits,
    settings,
    with_tokenizer,
)

QUESTION = "串丼"
GREEDY = ["--do_sample", "false", "--max_new_tokens", "6", "--device", "cpu"]


@pytest.fixture
def tuned(tmp_path, weights_folder):
    """tuned(name, method): a folder as a training of that method leaves it."""

    def train(name, method, **options):
        chosen = settings(weights_folder, method, **options)
        model = build(chosen)
        folder = str(tmp_path / name)
        tokenizer = load_tokenizer(str(weights_folder))
        save_trained(model, whole_state(model), chosen, folder, tokenizer=tokenizer)
        return folder

    return train


def answer(model, tokenizer, question=QUESTION):
    return model.chat(tokenizer, question, do_sample=False, max_length=128, max_new_tokens=6)[0]


def answers(text):
    return [line.removeprefix("答：") for line in text.splitlines() if line.startswith("答：")]


# Settings that depend on the weights


def resolved(config=None, model=None, **train):
    chosen = settings("./weights", model=model, train={"precision": "auto", **train})
    return resolve_settings(chosen, ChatGLMConfig(**{**SHAPE, **(config or {})})).train


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("named", "asked", "found"),
    [(None, "auto", "32"), (None, "bf16", "bf16"), (32, "auto", "32"), (32, "32", "32")],
)
def test_auto_precision_is_what_the_config_names_else_32_on_a_cpu(without_gpu, named, asked, found):
    config = {} if named is None else {"precision": named}
    assert resolved(config, precision=asked).precision == found


@pytest.mark.parametrize(
    ("named", "asked", "message"),
    [
        (32, "bf16", "precision bf16 contradicts config.json's precision 32"),
        (16, "32", "precision 32 contradicts config.json's precision 16"),
        (8, "auto", "precision 8; allowed are 16 and 32"),
        (None, "16", "precision 16 needs a GPU"),
        (16, "auto", "precision 16 needs a GPU"),
    ],
)
def test_a_precision_that_contradicts_the_config_or_the_machine_is_refused(
    without_gpu, named, asked, message
):
    with pytest.raises(ToolkitError, match=message):
        resolved({} if named is None else {"precision": named}, precision=asked)


@pytest.mark.parametrize("precision", ["auto", "32"])
def test_weights_trained_in_bf16_need_arithmetic_in_bf16(without_gpu, precision):
    with pytest.raises(ToolkitError, match="trained_precision bf16 with precision 32"):
        resolved(precision=precision, trained_precision="bf16")
    assert resolved(precision="bf16", trained_precision="bf16").trained_precision == "bf16"


def test_activations_are_recomputed_for_models_above_a_billion_parameters_unless_set():
    large = {"hidden_size": 4096, "inner_hidden_size": 16384, "num_layers": 28}
    assert resolved().gradient_checkpointing == "none"
    assert resolved(large).gradient_checkpointing == "selective"
    assert resolved(large, gradient_checkpointing=False).gradient_checkpointing == "none"
    assert resolved(gradient_checkpointing=True).gradient_checkpointing == "full"
    assert resolved(large, gradient_checkpointing="full").gradient_checkpointing == "full"


def write_config_file(folder, **content):
    (folder / "extra.json").write_text(json.dumps({"model_type": "chatglm", **content}))
    return str(folder / "extra.json")


def test_a_config_file_beside_weights_must_have_their_shape(tmp_path):
    path = write_config_file(tmp_path, num_layers=3, seq_length=7)
    with pytest.raises(ToolkitError, match=r"extra\.json: num_layers 3, but the weights have 2"):
        resolved(config_name=path)
    path = write_config_file(tmp_path, num_layers=2, hidden_size=64)
    assert resolved(config_name=path, precision="32").precision == "32"


def test_the_precision_of_a_config_file_holds_for_the_weights(tmp_path, without_gpu):
    path = write_config_file(tmp_path, precision=32)
    assert resolved(config_name=path).precision == "32"
    with pytest.raises(ToolkitError, match="precision bf16 contradicts"):
        resolved(config_name=path, precision="bf16")


@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_a_config_file_that_is_no_object_is_named(tmp_path, content):
    (tmp_path / "extra.json").write_text(content)
    with pytest.raises(ToolkitError, match=r"extra\.json: "):
        read_json(str(tmp_path / "extra.json"))


def test_a_file_like_config_ptv2_switches_p_tuning_on(tmp_path, weights_folder):
    path = write_config_file(tmp_path, pre_seq_len=5, prefix_projection=True)
    argv = ["--model_name_or_path", str(weights_folder), "--config_name", path]
    chosen, _ = read_settings(
        [*argv, "--precision", "32", "--max_seq_length", "64"], description=""
    )
    _, config = build_tokenizer(chosen, [])
    model = build_model(resolve_settings(chosen, config), config, total_steps=1)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert chosen.method == "ptuning" and len(trained) == 5
    assert trained["transformer.prefix_encoder.embedding.weight"].shape == (5, 64)


def test_a_sample_longer_than_the_model_reads_is_refused(weights_folder):
    with pytest.raises(ToolkitError, match="max_seq_length 129: this model reads at most"):
        build_tokenizer(settings(weights_folder, train={"max_seq_length": 129}), [])


# Models to train


def test_new_weights_are_drawn_from_the_seed(capsys):
    def draw(seed):
        chosen = settings("", train={"seed": seed})
        return build_model(chosen, ChatGLMConfig(**SHAPE), total_steps=1).state_dict()

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert "config_tiny.json (new weights): 2 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "held"), [(m, h) for m, h in every_pair() if h in ("whole", "int4")]
)
def test_recomputed_activations_give_the_same_gradients(weights_folder, method, held):
    found = []
    for recomputed in (False, True):
        chosen = settings(weights_folder, method, model=QUANTIZED.get(held),
                          train={"gradient_checkpointing": recomputed})  # fmt: skip
        found.append(gradients(build(chosen), chosen))
    plain, recomputed = found
    for name, gradient in plain.items():
        assert (gradient is None) == (recomputed[name] is None), name
        assert gradient is None or torch.allclose(gradient, recomputed[name], atol=1e-6), name


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("full", {}, "int4 weights can't be trained themselves"),
        ("freeze", {}, "int4 weights can't be trained themselves"),
        ("dora", {}, "use_dora needs unquantised weights, these are int4"),
        ("rslora", {"model": {"quantization_bit": 8}}, "its weights are int4 already"),
        ("rslora", {"model": {"load_in_4bit": True}}, "its weights are int4 already"),
    ],
)
def test_released_packed_weights_refuse_what_cannot_be_done_with_them(
    tmp_path, quantized_folders, method, options, message
):
    folder = with_tokenizer(quantized_folders[4], tmp_path / "packed")
    with pytest.raises(ToolkitError, match=f"{folder}: .*{message}"):
        build(settings(folder, method, **options))


def test_released_packed_weights_may_be_named_by_their_own_bits(tmp_path, quantized_folders):
    folder = with_tokenizer(quantized_folders[4], tmp_path / "packed")
    expected = logits(build(settings(folder, "rslora")))
    found = logits(build(settings(folder, "rslora", model={"quantization_bit": 4})))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("method", "switch", "options", "message"),
    [
        ("dora", "load_in_8bit", {}, "DoRA over bitsandbytes' int8 needs a GPU"),
        ("biases", "load_in_8bit", {}, "lora_info_args.bias all with load_in_8bit"),
        ("biases", "load_in_4bit", {}, "lora_info_args.bias all with load_in_4bit"),
        (
            "adalora",
            "load_in_4bit",
            {"adalora": {"bias": "lora_only"}},
            "adalora_info_args.bias lora_only with load_in_4bit",
        ),
    ],
)
def test_bitsandbytes_refuses_what_it_would_compute_wrongly(
    weights_folder, method, switch, options, message
):
    with pytest.raises(ToolkitError, match=message):
        build(settings(weights_folder, method, model={switch: True}, **options))


# Folders to chat with


@pytest.mark.parametrize(
    ("method", "what"), [("ptuning", "a prefix encoder"), ("rslora", "an adapter")]
)
def test_a_folder_that_does_not_say_its_weights_asks_for_them(tuned, weights_folder, method, what):
    folder = tuned("last", method)
    expected = logits(load_for_inference(folder, device="cpu")[0])
    Path(folder, "settings.json").unlink()
    if method == "rslora":  # PEFT's own file names them as well
        assert torch.equal(logits(load_for_inference(folder, device="cpu")[0]), expected)
        edit_json(folder, "adapter_config.json", base_model_name_or_path="")
    with pytest.raises(ToolkitError, match=f"holds {what} alone .* give --model_name_or_path"):
        load_for_inference(folder, device="cpu")
    model, _ = load_for_inference(folder, base=str(weights_folder), device="cpu")
    assert torch.equal(logits(model), expected)


def edit_json(folder, name, **changes):
    path = f"{folder}/{name}"
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({**content, **changes}, file)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("./moved/away", r"stands on \./moved/away .*: \./moved/away: no such folder"),
        ("THUDM/chatglm-6b", r"stands on .*THUDM/chatglm-6b: neither a folder here nor reachable"),
    ],
)
def test_weights_under_a_folder_that_are_gone_are_named(tuned, base, message):
    folder = tuned("last", "rslora")
    edit_json(folder, "settings.json", model_name_or_path=base)
    with pytest.raises(ToolkitError, match=message):
        load_for_inference(folder, device="cpu")


def test_a_second_adapter_may_not_take_the_name_of_the_first(tuned):
    folder = tuned("last", "rslora")
    with pytest.raises(ToolkitError, match="'default' is "):
        load_for_inference(folder, device="cpu", adapters={"default": folder})


@pytest.mark.parametrize("held", QUANTIZED)
def test_a_chat_holds_the_weights_as_the_training_did_and_says_so(
    tuned, weights_folder, capsys, held
):
    folder = tuned("last", "rslora", model=QUANTIZED[held])
    capsys.readouterr()
    model, _ = load_for_inference(folder, device="cpu")
    kind = {"int8": "QuantizedLinear", "int4": "QuantizedLinear", "nf4": "Linear4bit",
            "bnb int8": "Linear8bitLt"}[held]  # fmt: skip
    linear = model.get_base_model().transformer.layers[0].mlp.dense_h_to_4h
    assert type(linear).__name__ == kind
    said = capsys.readouterr().out.splitlines()[0]
    bare = describe(load(weights_folder), str(weights_folder))
    named = held.replace("bnb", "bitsandbytes")
    assert said == bare.replace(", float32", f", {named} weights, float32")


@pytest.mark.parametrize("precision", ["bf16", "16"])
@pytest.mark.parametrize(
    ("method", "held"), [(m, h) for m, h in every_pair() if m in ("projection", "dora", "adalora")]
)
def test_a_chat_in_half_precision_answers_about_the_same(tuned, caplog, method, held, precision):
    folder = tuned("last", method, model=QUANTIZED.get(held))
    expected = logits(load_for_inference(folder, device="cpu")[0])
    model, tokenizer = load_for_inference(folder, device="cpu", precision=precision)
    found = logits(model)
    assert found.dtype == {"bf16": torch.bfloat16, "16": torch.float16}[precision]
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()
    answer(model, tokenizer)
    assert not [record for record in caplog.records if "bitsandbytes" in record.name]


# The scripts


def test_full_weights_answer_a_query(tuned, capsys):
    folder = tuned("last", "full")
    expected = answer(*load_for_inference(folder, device="cpu"))
    infer_finetuning.main(["--checkpoint", folder, "--query", QUESTION, *GREEDY])
    infer.main(["--model_name_or_path", folder, "--query", QUESTION, *GREEDY])
    assert answers(capsys.readouterr().out) == [expected] * 2 and expected


def test_a_prefix_encoder_answers_a_query_unlike_the_bare_weights(tuned, weights_folder, capsys):
    folder = tuned("last", "projection")
    infer_finetuning.main(["--checkpoint", folder, "--query", QUESTION, *GREEDY])
    infer.main(["--model_name_or_path", str(weights_folder), "--query", QUESTION, *GREEDY])
    output = capsys.readouterr().out
    assert f"loaded {folder}: 3 virtual tokens" in output
    tuned_answer, bare = answers(output)
    assert tuned_answer == answer(*load_for_inference(folder, device="cpu")) != bare


@pytest.mark.parametrize("method", ["dora", "adalora"])
def test_an_adapter_answers_a_query(tuned, capsys, method):
    folder = tuned("last", method)
    infer_lora_finetuning.main(["--checkpoint", folder, "--query", QUESTION, *GREEDY])
    expected = answer(*load_for_inference(folder, device="cpu"))
    assert answers(capsys.readouterr().out) == [expected]


def test_random_weights_answer_in_gibberish_when_none_are_named(tmp_path, capsys):
    infer.main(["--output_dir", str(tmp_path), "--query", "你好", "--device", "cpu"])
    output = capsys.readouterr().out
    assert "a tiny ChatGLM with random weights answers" in output and answers(output)


@pytest.mark.parametrize("held", ["whole", "int8", "int4", "nf4"])
def test_a_merged_folder_is_plain_weights_that_answer_as_the_adapter_did(
    tuned, tmp_path, capsys, held
):
    folder, merged = tuned("last", "lora", model=QUANTIZED.get(held)), f"{tmp_path}/merged/"
    merge = ["--enable_merge_weight", "--merge_dir", merged]
    infer_lora_finetuning.main(["--checkpoint", folder, *merge, "--query", QUESTION, *GREEDY])
    output = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"last", "merged"}
    assert ("the weights are quantised" in output) == (held != "whole")
    assert f"saved {merged}: python infer.py --model_name_or_path {merged}" in output
    infer.main(["--model_name_or_path", merged, "--query", QUESTION, *GREEDY])
    infer_lora_finetuning.main(["--checkpoint", folder, *merge, "--query", QUESTION, *GREEDY])
    first, second = answers(capsys.readouterr().out)
    assert [first] == answers(output) and second == first
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert not config.get("quantization_bit") and "quantization_config" not in config
    adapted, plain = (load_for_inference(f, device="cpu")[0] for f in (folder, merged))
    assert type(plain.transformer.layers[1].mlp.dense_4h_to_h) is torch.nn.Linear
    assert (logits(plain) - logits(adapted)).abs().max() < 1e-5


def kinds_of_linears(model):
    return {type(m).__name__ for m in model.modules() if hasattr(m, "in_features")}


@pytest.mark.parametrize("bits", [4, 8])
def test_infer_packs_the_weights_as_the_seed_s_users_do_in_the_script(
    weights_folder, capsys, monkeypatch, bits
):
    model, tokenizer = load_for_inference(str(weights_folder), device="cpu")
    expected = answer(model.quantize(bits), tokenizer)
    argv = ["--model_name_or_path", str(weights_folder), "--query", QUESTION, *GREEDY]
    infer.main([*argv, "--quantization_bit", str(bits)])
    monkeypatch.setattr(infer, "load_for_inference", lambda *args, **options: (model, tokenizer))
    infer.main(argv)
    output = capsys.readouterr().out
    assert answers(output) == [expected] * 2 and f", int{bits} weights, float32" in output


def test_infer_holds_weights_as_models_py_says_whatever_is_trained(weights_folder, capsys):
    pytest.importorskip("bitsandbytes")
    argv = ["--model_name_or_path", str(weights_folder), "--query", QUESTION, *GREEDY]
    infer.main([*argv, "--load_in_4bit", "true"])
    infer.main([*argv, "--quantization_bit", "0"])
    output = capsys.readouterr().out
    assert output.count(", nf4 weights, ") == 1 and len(answers(output)) == 2


def test_random_weights_are_packed_too(tmp_path, monkeypatch, capsys):
    talked = []
    monkeypatch.setattr(infer, "converse", lambda model, *rest: talked.append(model))
    argv = ["--output_dir", str(tmp_path), "--device", "cpu"]
    infer.main([*argv, "--quantization_bit", "4"])
    assert talked[0].quantized and "QuantizedLinear" in kinds_of_linears(talked[0])
    with pytest.raises(ToolkitError, match="load_in_8bit: name stored weights"):
        infer.main([*argv, "--load_in_8bit"])


@pytest.mark.parametrize("method", ["full", "ptuning"])
def test_trained_weights_are_packed_if_asked(tuned, capsys, method):
    folder = tuned("last", method)
    model, tokenizer = load_for_inference(folder, device="cpu", quantization_bit=4)
    argv = ["--checkpoint", folder, "--query", QUESTION, *GREEDY]
    capsys.readouterr()
    infer_finetuning.main([*argv, "--quantization_bit", "4"])
    output = capsys.readouterr().out
    assert model.quantized and answers(output) == [answer(model, tokenizer)]
    said = f"{folder} was trained without quantization_bit 4: its answers may differ a little"
    assert (said in output) == (method == "ptuning")


def test_an_adapter_of_whole_weights_answers_over_packed_ones_and_says_so(tuned, capsys):
    folder = tuned("last", "rslora")
    argv = ["--checkpoint", folder, "--query", QUESTION, *GREEDY, "--quantization_bit", "8"]
    infer_lora_finetuning.main(argv)
    output = capsys.readouterr().out
    assert "was trained without quantization_bit 8" in output and ", int8 weights, " in output
    model, tokenizer = load_for_inference(folder, device="cpu", quantization_bit=8)
    assert answers(output) == [answer(model, tokenizer)]


@pytest.mark.parametrize("held", QUANTIZED)
@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_of_quantised_weights_keeps_to_their_bits(tuned, capsys, held, bits):
    folder = tuned("last", "rslora", model=QUANTIZED[held])
    if held == f"int{bits}":
        asked, as_trained = (
            load_for_inference(folder, device="cpu", quantization_bit=b)[0] for b in (bits, 0)
        )
        assert torch.equal(logits(asked), logits(as_trained))
        assert "was trained without" not in capsys.readouterr().out
        return
    (switch,) = QUANTIZED[held]
    named = f"quantization_bit {bits}: {folder} was trained on weights with {switch}"
    with pytest.raises(ToolkitError, match=named):
        load_for_inference(folder, device="cpu", quantization_bit=bits)


@pytest.mark.parametrize("asked", [{"quantization_bit": 8}, {"bitsandbytes_bits": 4}])
def test_a_packed_folder_keeps_to_its_bits(tmp_path, quantized_folders, asked):
    folder = str(with_tokenizer(quantized_folders[4], tmp_path / "packed"))
    with pytest.raises(ToolkitError, match=f"{folder}: its weights are int4 already"):
        load_for_inference(folder, device="cpu", **asked)
    model, _ = load_for_inference(folder, device="cpu", quantization_bit=4)
    assert torch.equal(logits(model), logits(load(quantized_folders[4])))


def test_bits_and_merging_exclude_each_other(tuned, tmp_path):
    argv = ["--checkpoint", tuned("last", "rslora"), "--enable_merge_weight", "--merge_dir",
            str(tmp_path / "merged"), "--quantization_bit", "4"]  # fmt: skip
    with pytest.raises(ToolkitError, match="would merge into rounded weights: merge without"):
        infer_lora_finetuning.main(argv)
    assert not (tmp_path / "merged").exists()


def test_merging_replaces_no_folder_that_is_there(tuned, tmp_path):
    folder = tuned("last", "rslora")
    (tmp_path / "thesis").mkdir()
    for there in (tmp_path / "thesis", tmp_path, folder):
        argv = ["--checkpoint", folder, "--enable_merge_weight", "--merge_dir", str(there)]
        with pytest.raises(ToolkitError, match=f"merge_dir {there} is there already"):
            infer_lora_finetuning.main(argv)
    assert {path.name for path in tmp_path.iterdir()} == {"last", "thesis"}


def test_a_script_given_the_other_ones_folder_names_the_other(tuned):
    full, prefix = tuned("full", "full"), tuned("prefix", "ptuning")
    adapter = tuned("adapter", "rslora")
    with pytest.raises(ToolkitError, match=f"infer_lora_finetuning.py --checkpoint {adapter}"):
        infer_finetuning.main(["--checkpoint", adapter])
    for folder in (full, prefix):
        with pytest.raises(ToolkitError, match=f"infer_finetuning.py --checkpoint {folder}"):
            infer_lora_finetuning.main(["--checkpoint", folder])


@pytest.mark.parametrize("script", ["infer", "infer_finetuning", "infer_lora_finetuning"])
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--top_q", "1"], "unknown setting 'top_q'. Did you mean 'top_p'?"),
        (["--quantization_bit", "3"], "quantization_bit"),
        (None, "no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys, script, argv, message):
    where = "--model_name_or_path" if script == "infer" else "--checkpoint"
    monkeypatch.setattr(sys, "argv", [script, *(argv or [where, "./absent"])])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(f"{script}.py", run_name="__main__")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_adapters_change_by_name_in_the_midst_of_a_conversation(
    tuned, weights_folder, monkeypatch, capsys
):
    folders = {"default": tuned("one", "rslora"), "law": tuned("two", "biases")}
    edit_json(folders["law"], "adapter_config.json", bias="none")
    path = f"{folders['law']}/adapter_model.safetensors"
    save_file({n: -2 * t for n, t in load_file(path).items() if "lora_" in n}, path)
    tokenizer = load_tokenizer(str(weights_folder))
    expected = {
        name: answer(load_adapters(load(weights_folder), {"default": folder}), tokenizer)
        for name, folder in folders.items()
    }
    expected["none"] = answer(load(weights_folder), tokenizer)
    assert len({*expected.values()}) == 3
    lines = ["/adapter nobody", QUESTION, "/adapter law", QUESTION, "/adapter none", QUESTION,
             "/adapter default", QUESTION, "/clear", QUESTION, "/exit", QUESTION]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    model, tokenizer = load_for_inference(
        folders["default"], device="cpu", adapters={"law": folders["law"]}
    )
    converse(model, tokenizer, ChatSettings(do_sample=False, max_new_tokens=6))
    output = capsys.readouterr().out
    assert "adapters: default, law, none" in output
    order = ["default", "law", "none", "default", "default"]
    assert answers(output) == [expected[name] for name in order]


def test_a_conversation_remembers_until_it_is_cleared(weights_folder, monkeypatch, capsys):
    model, tokenizer = load_for_inference(str(weights_folder), device="cpu")
    first = answer(model, tokenizer)
    chat = {"do_sample": False, "max_length": 128, "max_new_tokens": 6}
    second = model.chat(tokenizer, "丞", [(QUESTION, first)], **chat)[0]
    lines = [QUESTION, "丞", "/clear", "丞", "/adapter x"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    converse(model, tokenizer, ChatSettings(do_sample=False, max_new_tokens=6))
    output = capsys.readouterr().out
    assert answers(output) == [first, second, answer(model, tokenizer, "丞")]
    assert "unknown command /adapter x" in output
