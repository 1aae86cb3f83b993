"""Checkpoints of DeepSpeed, Lightning and unfinished runs chat on as the models that wrote them."""

import json
import shutil
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

import chatglm.conversion as conversion
import convert_checkpoint
from chatglm.building import load_for_inference
from chatglm.command_line import run_script
from chatglm.conversion import convert
from chatglm.errors import ToolkitError
from chatglm.old_files import read_old
from chatglm.saved import kind_of, read_settings_json
from chatglm.weights import load_pretrained

from . import old_checkpoints
from .conftest import GOLDEN
from .tiny_weights import build, logits, settings, with_tokenizer

QUICK = ("ptuning-2-32", "lora-3-32", "full-0-32", "scratch-none-32")
SLOW = (
    "full-1-32", "full-3-bf16", "lora-0-32", "lora-2-bf16", "ptuning-3-32", "projection-1-32",
    "freeze-3-32", "rich-2-32", "adalora-none-32", "engine-2",
)  # fmt: skip
TWO_RANKS = ("engine-3",)
PREFIXES = (
    "",
    "module.",
    "model.",
    "backbone.model.",
    "_TransformerLightningModule__backbone.transformer_base.",
    "_forward_module._TransformerLightningModule__backbone.transformer_base.",
    "_forward_module.model.base_model.model.",
)
OLD = PREFIXES[-2]


# What the writers themselves wrote.


class Written:
    """The folder that old_checkpoints writes into, as far as it is asked for."""

    def __init__(self, folder):
        self.folder, self.base = folder, str(folder / "base")

    def get(self, name):
        group = next(names for names in (QUICK, TWO_RANKS, SLOW) if name in names)
        new = [n for n in group if not (self.folder / f"{n}.logits").exists()]
        if name in new:
            old_checkpoints.write(self.folder, new, ranks=2 if group is TWO_RANKS else None)
        return self.folder / name

    def logits(self, name):
        return torch.load(self.folder / f"{name}.logits").float()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return Written(tmp_path_factory.mktemp("written"))


def load(folder, precision="32"):
    return load_for_inference(str(folder), device="cpu", precision=precision)[0]


def check_logits(written, name, folder):
    precision = name.rpartition("-")[2] if "engine" not in name else "32"
    found = old_checkpoints.logits(load(folder, precision)).float()
    expected = written.logits(name)
    allowed = 1e-5 if precision == "32" else 0.01  # ZeRO-3 computes linears otherwise
    assert (found - expected).abs().max() < allowed * expected.abs().max()
    untrained = old_checkpoints.logits(load(written.base)).float()
    assert (untrained - expected).abs().max() > 1e-3 * expected.abs().max()


def check_unfinished_run(written, name, tmp_path):
    line = convert(str(written.get(name)), str(tmp_path / "new"))
    check_logits(written, name, tmp_path / "new")
    kind = {"ptuning": "prefix", "projection": "prefix", "lora": "adapter", "rich": "adapter",
            "adalora": "adapter"}.get(name.partition("-")[0], "weights")  # fmt: skip
    assert kind_of(str(tmp_path / "new")) == kind
    script = "infer_lora_finetuning" if kind == "adapter" else "infer_finetuning"
    assert line.endswith(f"talk to it with: python {script}.py --checkpoint {tmp_path}/new")
    run = json.loads((written.folder / name / "run.json").read_text())["settings"]
    assert read_settings_json(str(tmp_path / "new")) == run
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("name", QUICK)
def test_a_run_that_was_cut_off_is_rescued(written, name, tmp_path):
    check_unfinished_run(written, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW[:-1])
def test_a_run_that_was_cut_off_is_rescued_whatever_it_trained_and_however(written, name, tmp_path):
    check_unfinished_run(written, name, tmp_path)


@pytest.mark.parametrize("name", ["ptuning-2-32", "lora-3-32", "full-0-32"])
def test_the_same_tensors_without_the_settings_of_their_run_become_the_same(
    written, name, tmp_path
):
    old = tmp_path / "old"
    shutil.copytree(written.get(name) / "state.ckpt", old)
    alpha = {"lora_alpha": 7} if "lora" in name else {}
    convert(str(old), str(tmp_path / "new"), model_name_or_path=written.base, **alpha)
    check_logits(written, name, tmp_path / "new")
    known = read_settings_json(str(tmp_path / "new"))
    assert known["model_name_or_path"] == written.base and "learning_rate" not in known


@pytest.mark.slow
@pytest.mark.parametrize("name", ["engine-2", "engine-3"])
def test_what_a_plain_engine_wrote_becomes_the_prefix_encoder_alone(written, name, tmp_path):
    old = written.get(name)
    line = convert(str(old), str(tmp_path / "new"), model_name_or_path=written.base)
    assert f"5 virtual tokens on {written.base} (the weights beside them are those of" in line
    assert kind_of(str(tmp_path / "new")) == "prefix"
    check_logits(written, name, tmp_path / "new")


@pytest.mark.slow
def test_shards_are_joined_as_deepspeed_joins_them(written):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    old = written.get("engine-3")
    expected = get_fp32_state_dict_from_zero_checkpoint(str(old))
    found = read_old(str(old)).state
    assert found.keys() == expected.keys() and len(found) > 20
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("remove", "reason"),
    [
        ("*_model_states.pt", "no mp_rank_00_model_states.pt, zero_pp_rank"),
        ("*_optim_states.pt", "written by 1 ranks, but it has 1 of .* and 0 of"),
    ],
)
def test_missing_shards_are_counted(written, tmp_path, remove, reason):
    shutil.copytree(written.get("lora-3-32"), tmp_path / "old")
    for path in (tmp_path / "old" / "state.ckpt" / "checkpoint").glob(remove):
        path.unlink()
    with pytest.raises(ToolkitError, match=reason):
        convert(str(tmp_path / "old"), str(tmp_path / "new"))


# Files made by hand as older versions wrote them.


@pytest.fixture
def old_file(tmp_path):
    """old_file(state, **beside): the path of a Lightning file."""

    def write(state, **beside):
        path = tmp_path / "last.ckpt"
        torch.save({"state_dict": state, "epoch": 3, **beside}, path)
        return str(path)

    return write


@pytest.fixture
def change(weights_folder, tmp_path, old_file):
    """change(state, **options): converts a file of this state; the folder."""

    def run(state, **options):
        options = {"model_name_or_path": str(weights_folder), **options}
        convert(old_file(state), str(tmp_path / "new"), **options)
        return tmp_path / "new"

    return run


def named(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def trained(weights_folder, method, **groups):
    """The model after a few steps, and its trained tensors by their names."""
    model = build(settings(weights_folder, method, **groups))
    return model, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def base_state(weights_folder):
    return load_file(weights_folder / "model.safetensors")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("method", ["ptuning", "projection"])
def test_a_prefix_encoder_is_found_under_every_old_name(weights_folder, change, prefix, method):
    model, state = trained(weights_folder, method)
    folder = change(named(state, prefix))
    assert kind_of(str(folder)) == "prefix"
    assert torch.equal(logits(load(folder)), logits(model))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_full_weights_are_found_under_every_old_name(weights_folder, change, prefix):
    model, state = trained(weights_folder, "full")
    tables = {"transformer.layers.0.attention.rotary_emb.inv_freq": torch.ones(4)}
    folder = change(named({**state, **tables}, prefix))
    assert torch.equal(logits(load(folder)), logits(model))
    assert {"config.json", "ice_text.model", "tokenizer_config.json"} < {
        path.name for path in folder.iterdir()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_full_weights_keep_their_precision(weights_folder, change, dtype):
    _, state = trained(weights_folder, "full")
    folder = change({name: tensor.to(dtype) for name, tensor in state.items()})
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[name], tensor.to(dtype)) for name, tensor in state.items())
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype)[6:]


def first_peft_names(state):
    return {name.replace(".default.", "."): tensor for name, tensor in state.items()}


def other_adapter_name(state):
    return {name.replace(".default", ".law"): tensor for name, tensor in state.items()}


def shorter_prefix(state):
    return {name.replace("base_model.model.", OLD): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("names", [dict, first_peft_names, other_adapter_name, shorter_prefix])
@pytest.mark.parametrize("method", ["lora", "dora", "saved modules", "adalora"])
def test_lora_is_found_under_every_old_name(weights_folder, change, names, method):
    if (names, method) == (first_peft_names, "saved modules"):
        pytest.skip("came with adapter names")
    model, state = trained(weights_folder, method)
    folder = change(names(state), lora_alpha=32)
    assert kind_of(str(folder)) == "adapter"
    assert (logits(load(folder)) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize("names", ["as PEFT wraps them now", "as PEFT wrapped them first"])
def test_lora_beside_the_weights_under_it_leaves_them_out(weights_folder, change, names):
    model, _ = trained(weights_folder, "lora")
    state = model.state_dict()
    if names == "as PEFT wrapped them first":
        state = {name.replace(".base_layer", ""): tensor for name, tensor in state.items()}
    folder = change(named(state, "_forward_module."), lora_alpha=32)
    assert torch.equal(logits(load(folder)), logits(model))
    assert not (folder / "model.safetensors").exists()


def test_lora_on_other_weights_is_refused_by_the_name_that_differs(weights_folder, change):
    model, _ = trained(weights_folder, "lora")
    state = model.state_dict()
    state["base_model.model.transformer.layers.1.mlp.dense_h_to_4h.weight"][3, 3] += 1
    with pytest.raises(ToolkitError, match=r"layers\.1\.mlp\.dense_h_to_4h\.weight under the"):
        change(state, lora_alpha=32)


def test_a_prefix_encoder_beside_changed_weights_keeps_them(weights_folder, change):
    model, _ = trained(weights_folder, "ptuning")
    model.transformer.layers[1].mlp.dense_h_to_4h.weight.data[3, 3] += 1
    folder = change(named(model.state_dict(), OLD))
    assert kind_of(str(folder)) == "weights"
    assert torch.equal(logits(load(folder)), logits(model))
    assert load(folder).config.pre_seq_len == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_prefix_encoder_beside_unchanged_weights_stands_alone(weights_folder, change, dtype):
    model, state = trained(weights_folder, "ptuning")
    base = {name: tensor.to(dtype) for name, tensor in base_state(weights_folder).items()}
    folder = change(named({**base, **state}, OLD))
    assert kind_of(str(folder)) == "prefix"
    assert torch.equal(logits(load(folder)), logits(model))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_prefix_encoder_on_weights_packed_while_loading_is_chatted_with_on_such(
    weights_folder, change, bits
):
    model, _ = trained(weights_folder, "ptuning", model={"quantization_bit": bits})
    folder = change(named(model.state_dict(), "module."))
    assert kind_of(str(folder)) == "prefix"
    assert read_settings_json(str(folder))["quantization_bit"] == bits
    assert torch.equal(logits(load(folder)), logits(model))


def test_packed_weights_stay_packed(tmp_path, quantized_folders, old_file):
    base = with_tokenizer(quantized_folders[4], tmp_path / "packed")
    state = torch.load(base / "pytorch_model.bin", weights_only=True)
    state["transformer.final_layernorm.bias"] += 0.5
    line = convert(old_file(state), str(tmp_path / "new"), model_name_or_path=str(base))
    assert f"wrote {tmp_path}/new: int4 weights" in line
    loaded = load(tmp_path / "new").state_dict()
    kept = {name for name in state if not name.endswith("inv_freq")}
    assert loaded.keys() == kept
    assert all(torch.equal(loaded[name], state[name].to(loaded[name].dtype)) for name in kept)


def test_a_file_of_tensors_alone_is_read_too(weights_folder, tmp_path):
    model, state = trained(weights_folder, "ptuning")
    torch.save(named(state, OLD), tmp_path / "pytorch_model.bin")
    save_file(named(state, OLD), tmp_path / "model.safetensors")
    for name in ("pytorch_model.bin", "model.safetensors"):
        folder = tmp_path / f"new {name}"
        convert(str(tmp_path / name), str(folder), model_name_or_path=str(weights_folder))
        assert torch.equal(logits(load(folder)), logits(model))


# What LoRA is scaled by.


@pytest.fixture
def lora_file(weights_folder, old_file):
    """lora_file(**beside): the model with its adapter, and its file."""

    def write(**beside):
        model, state = trained(weights_folder, "lora", lora={"lora_alpha": 5})
        return model, old_file(state, **beside)

    return write


def test_lora_without_a_config_asks_for_its_scale(weights_folder, tmp_path, lora_file):
    _, path = lora_file()
    options = {"model_name_or_path": str(weights_folder)}
    with pytest.raises(ToolkitError, match="no file says by what its LoRA is scaled: give --lora_"):
        convert(path, str(tmp_path / "new"), **options)


def test_the_scale_is_taken_from_the_config_beside_it(weights_folder, tmp_path, lora_file):
    model, path = lora_file()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 5, "lora_dropout": 0.1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    options = {"model_name_or_path": str(weights_folder)}
    with pytest.raises(ToolkitError, match=r"--lora_alpha 6, but .* was trained with 5"):
        convert(path, str(tmp_path / "new"), **options, lora_alpha=6)
    convert(path, str(tmp_path / "new"), **options)
    assert torch.equal(logits(load(tmp_path / "new")), logits(model))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [({"r": 4}, "8 rows, but the config .* says r 4"), ({"alpha_pattern": {"dense": 1}}, "alpha_")],
)
def test_a_config_of_another_adapter_is_refused(weights_folder, tmp_path, lora_file, wrong, reason):
    _, path = lora_file()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 5, **wrong}))
    with pytest.raises(ToolkitError, match=reason):
        convert(path, str(tmp_path / "new"), model_name_or_path=str(weights_folder))


@pytest.fixture
def lost_class(monkeypatch):
    """A class whose module is gone when the file is read."""
    module = ModuleType("lost_project")
    kind = type("LoraArguments", (), {"__module__": "lost_project"})
    module.LoraArguments = kind
    monkeypatch.setitem(sys.modules, "lost_project", module)
    return kind


def test_the_scale_is_taken_from_hyper_parameters_of_a_class_that_is_gone(
    weights_folder, tmp_path, lora_file, lost_class, monkeypatch
):
    arguments = lost_class()
    arguments.__dict__.update(r=8, lora_alpha=5, bias="none")
    model, path = lora_file(hyper_parameters={"lora_args": arguments, "other": [1]})
    monkeypatch.delitem(sys.modules, "lost_project")
    convert(path, str(tmp_path / "new"), model_name_or_path=str(weights_folder))
    assert torch.equal(logits(load(tmp_path / "new")), logits(model))


# What is refused, in one line.


def without(name):
    return lambda state: {n: t for n, t in state.items() if n != name}


def with_tensor(name, tensor=None):
    value = torch.ones(2, 3) if tensor is None else tensor
    return lambda state: {**state, name: value}


HEAD, QKV = "lm_head.weight", "transformer.layers.1.attention.query_key_value"
WRONG = {
    "a missing tensor": ("full", without(f"{QKV}.bias"), rf"1 missing: {QKV}\.bias"),
    "an unknown tensor": ("full", with_tensor(f"{QKV}.scale"), rf"1 unknown: {QKV}\.scale"),
    "a misshapen tensor": ("full", with_tensor(HEAD), r"lm_head\.weight \[2, 3\] != \[320, 64\]"),
    "another model's": ("full", with_tensor("encoder.embed"), "not of a ChatGLM-6B: encoder.embed"),
    "two of one name": ("full", with_tensor(f"module.{HEAD}"), "two different tensors are lm_head"),
    "too wide a prefix": (
        "ptuning",
        with_tensor("transformer.prefix_encoder.embedding.weight"),
        r"embedding\.weight \[2, 3\] != \[2, 256\]",
    ),
    "half a projection": (
        "projection",
        without("transformer.prefix_encoder.trans.2.bias"),
        r"1 missing: transformer\.prefix_encoder\.trans\.2\.bias",
    ),
    "part of the weights": ("ptuning", with_tensor(HEAD), "27 missing"),
    "half of LoRA": (
        "lora",
        without(f"base_model.model.{QKV}.lora_B.default.weight"),
        r"1 missing: base_model\.model\..*lora_B\.default\.weight",
    ),
    "two ranks": (
        "lora",
        with_tensor(f"base_model.model.{QKV}.lora_A.default.weight", torch.ones(4, 64)),
        r"lora_A\.default\.weight \[4, 64\] != \[8, 64\]",
    ),
    "an unknown linear": (
        "lora",
        with_tensor("transformer.layers.0.attention.q_proj.lora_A.default.weight"),
        "unknown 'q_proj'",
    ),
    "two adapters": (
        "lora",
        with_tensor(f"{QKV}.lora_A.law.weight"),
        "the adapters default, law together",
    ),
    "LoRA and a prefix": (
        "lora",
        with_tensor("transformer.prefix_encoder.embedding.weight"),
        "an adapter and a prefix encoder together",
    ),
    "LoRA that was never trained": (
        "lora",
        lambda state: {n: t * ("lora_B" not in n) for n, t in state.items()},
        "never trained",
    ),
    "another rank in AdaLoRA's scale": (
        "adalora",
        with_tensor(f"{QKV}.ranknum.default", torch.tensor([3.0])),
        "ranknum.default is 3, but lora_E has 4 rows",
    ),
    "no tensor": ("full", with_tensor(HEAD, "text"), r"lm_head\.weight is no tensor but str"),
    "nothing": ("full", lambda state: {}, "holds no tensors"),
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_do_not_fit_are_refused_by_name(weights_folder, change, tmp_path, case):
    method, edit, reason = WRONG[case]
    _, state = trained(weights_folder, method)
    alpha = {"lora_alpha": 32} if "lora" in method else {}
    with pytest.raises(ToolkitError, match=reason) as caught:
        change(edit(state), **alpha)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_scale_without_lora_is_refused(weights_folder, change):
    _, state = trained(weights_folder, "ptuning")
    with pytest.raises(ToolkitError, match="--lora_alpha 8: there is no LoRA"):
        change(state, lora_alpha=8)


def test_another_shape_than_the_base_s_is_refused(change, weights_folder, tmp_path):
    _, state = trained(weights_folder, "ptuning")
    other = with_tokenizer(GOLDEN / "checkpoint", tmp_path / "other")
    with pytest.raises(ToolkitError, match="misshapen"):
        change(state, model_name_or_path=str(other))


def test_a_folder_that_exists_is_left_alone(weights_folder, change, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    with pytest.raises(ToolkitError, match="new: exists already"):
        change({})
    assert (tmp_path / "new" / "mine").exists()


def test_what_is_read_back_otherwise_is_not_left(weights_folder, change, tmp_path, monkeypatch):
    def save(model, state, *args, **options):
        state[HEAD] = state[HEAD] + 1
        saved(model, state, *args, **options)
        state[HEAD] = state[HEAD] - 1

    saved = conversion.save_trained
    monkeypatch.setattr(conversion, "save_trained", save)
    _, state = trained(weights_folder, "full")
    with pytest.raises(ToolkitError, match=r"/new: read back, lm_head\.weight is not what was"):
        change(state)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_base_must_be_named(change, weights_folder):
    _, state = trained(weights_folder, "ptuning")
    with pytest.raises(ToolkitError, match="give --model_name_or_path"):
        change(state, model_name_or_path="")


def test_a_mistake_is_a_line_and_exit_code_2(capsys):
    for argv in ([], ["--checkpoint=/nowhere"], ["--chekpoint=x"]):
        with pytest.raises(SystemExit) as ended:
            run_script(lambda _, argv=argv: convert_checkpoint.main(argv))
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_script_says_how_to_chat(weights_folder, tmp_path, old_file, capsys):
    _, state = trained(weights_folder, "ptuning")
    capsys.readouterr()
    convert_checkpoint.main([f"--checkpoint={old_file(state)}", f"--save_dir={tmp_path}/new",
                             f"--model_name_or_path={weights_folder}"])  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert f"python infer_finetuning.py --checkpoint {tmp_path}/new" in out


# Where and how it is read.


@pytest.fixture
def prefix_state(weights_folder):
    return trained(weights_folder, "ptuning")[1]


def deepspeed_file(folder, state):
    folder.mkdir(parents=True)
    torch.save({"module": state, "ds_version": "0.9.2"}, folder / "mp_rank_00_model_states.pt")


@pytest.mark.parametrize("place", [".", "checkpoint", "global_step100"])
def test_deepspeed_s_file_is_found_in_its_places(tmp_path, prefix_state, place):
    deepspeed_file(tmp_path / "old" / place, prefix_state)
    (tmp_path / "old" / "latest").write_text(f"{place}\n")
    assert read_old(str(tmp_path / "old")).state.keys() == prefix_state.keys()


def test_lightning_s_folder_needs_no_pointer(tmp_path, prefix_state):
    deepspeed_file(tmp_path / "old" / "checkpoint", prefix_state)
    assert read_old(str(tmp_path / "old")).where == str(tmp_path / "old" / "checkpoint")


def tensor_parallel(folder, state):
    deepspeed_file(folder, state)
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_01_model_states.pt")


def pointer_to_nothing(folder, state):
    folder.mkdir()
    (folder / "latest").write_text("global_step7")


def several(folder, state):
    deepspeed_file(folder / "checkpoint-20" / "global_step20", state)
    (folder / "last.ckpt").mkdir()


def plain_weights(folder, state):
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")


def a_file(content):
    def write(folder, state):
        folder.write_bytes(content)

    return write


def cut_short(folder, state):
    torch.save({"state_dict": state}, folder)
    folder.write_bytes(folder.read_bytes()[:-100])


def other_content(folder, state):
    torch.save({"weights": state, "epoch": 3}, folder)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (tensor_parallel, "split over 2 tensor-parallel ranks"),
        (pointer_to_nothing, "latest names .*global_step7, which does not exist"),
        (several, "give one of what is in it: checkpoint-20, last.ckpt"),
        (plain_weights, "infer_finetuning.py and infer_lora_finetuning.py read such"),
        (lambda folder, state: None, "no such file or folder"),
        (lambda folder, state: folder.mkdir(), "no mp_rank_00_model_states.pt"),
        (a_file(b"hello"), "can't be read .*it may be damaged"),
        (a_file(b""), "can't be read .*it may be damaged"),
        (cut_short, "can't be read .*it may be damaged"),
        (other_content, "weights is no tensor but dict; expected one of module, state_dict"),
    ],
)
def test_what_is_no_checkpoint_is_a_line_that_says_why(tmp_path, prefix_state, write, reason):
    write(tmp_path / "old", prefix_state)
    with pytest.raises(ToolkitError, match=reason) as caught:
        read_old(str(tmp_path / "old"))
    assert "\n" not in str(caught.value)


class Touches:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return exec, (f"open({self.path!r}, 'w').close()",)


def test_no_code_of_a_file_is_run(tmp_path, prefix_state, old_file):
    path = old_file(prefix_state, callbacks={"evil": Touches(tmp_path / "touched")})
    assert read_old(path).state.keys() == prefix_state.keys()
    assert not (tmp_path / "touched").exists()


class AttributeDict(dict):
    """A dict of a class of its own, as Lightning's of this name."""


def test_objects_of_any_class_beside_the_tensors_do_no_harm(prefix_state, old_file):
    beside = {"hyper_parameters": AttributeDict(lora_alpha=3), "kind": Touches, "set": {1, 2}}
    assert read_old(old_file(prefix_state, **beside)).state.keys() == prefix_state.keys()


def test_what_needs_its_own_code_is_run_only_when_it_is_trusted(tmp_path, prefix_state, capsys):
    path, touched = tmp_path / "last.ckpt", tmp_path / "touched"
    content = {"state_dict": prefix_state, "evil": Touches(touched)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ToolkitError, match=r"running code .*GLOBAL exec.*add --trust_pickle true"):
        read_old(str(path))
    assert not touched.exists()
    assert read_old(str(path), trust_pickle=True).state.keys() == prefix_state.keys()
    assert touched.exists() and "as trust_pickle says" in capsys.readouterr().out


def test_the_chat_scripts_load_what_was_converted(weights_folder, change, prefix_state):
    folder = change(prefix_state)
    _, tokenizer = load_for_inference(str(folder), device="cpu")
    _, own = load_pretrained(str(weights_folder), device="cpu")
    assert tokenizer.get_vocab() == own.get_vocab()
