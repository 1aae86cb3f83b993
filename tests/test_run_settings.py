"""The settings of a run: what excludes what, what fills a null, what makes another run."""

import json

import pytest

from chatglm.errors import ToolkitError
from chatglm.run_settings import DEFAULT_LEARNING_RATES, Settings
from chatglm.settings import (
    AdaLoraSettings,
    DataSettings,
    LoraSettings,
    ModelSettings,
    TrainSettings,
)

WEIGHTS = "./weights"
SWITCHES = {
    "freeze": {"model": ModelSettings(global_num_layers_freeze=1)},
    "ptuning": {"model": ModelSettings(pre_seq_len=4)},
    "lora": {"lora": LoraSettings(with_lora=True)},
    "adalora": {"adalora": AdaLoraSettings(with_lora=True)},
}


def settings(*, model=None, lora=None, adalora=None, data=None, **train):
    return Settings(
        TrainSettings(**{"model_name_or_path": WEIGHTS, **train}),
        data or DataSettings(),
        model or ModelSettings(),
        lora or LoraSettings(),
        adalora or AdaLoraSettings(),
    )


@pytest.mark.parametrize("method", SWITCHES)
def test_the_switch_that_is_on_is_the_method(method):
    assert settings().method == "full"
    assert settings(**SWITCHES[method]).method == method


@pytest.mark.parametrize(
    ("first", "second"),
    [(a, b) for a in SWITCHES for b in SWITCHES if a < b and {a, b} != {"freeze", "ptuning"}],
)
def test_two_methods_exclude_each_other_by_name(first, second):
    with pytest.raises(ToolkitError, match="exclude each other: each says which weights"):
        settings(**SWITCHES[first], **SWITCHES[second])


def test_freezing_and_virtual_tokens_exclude_each_other():
    with pytest.raises(ToolkitError, match=r"global_num_layers_freeze and p-tuning \(pre_seq_len"):
        settings(model=ModelSettings(global_num_layers_freeze=1, pre_seq_len=4))


@pytest.mark.parametrize("method", SWITCHES)
def test_a_method_needs_weights_to_tune(method):
    with pytest.raises(ToolkitError, match="model_name_or_path is empty: train the tiny model"):
        settings(**SWITCHES[method], model_name_or_path="")


@pytest.mark.parametrize("quantized", [{"quantization_bit": 4}, {"load_in_8bit": True}])
def test_quantised_weights_are_refused_where_they_would_be_trained(quantized):
    for model in (
        ModelSettings(**quantized),
        ModelSettings(global_num_layers_freeze=1, **quantized),
    ):
        with pytest.raises(ToolkitError, match=f"{next(iter(quantized))}: quantised weights"):
            settings(model=model)
    allowed = settings(model=ModelSettings(**quantized), **{"lora": LoraSettings(with_lora=True)})
    assert allowed.quantization == next(iter(quantized))


@pytest.mark.parametrize("quantized", [{"quantization_bit": 4}, {"load_in_8bit": True}])
def test_a_chat_may_hold_weights_as_nothing_can_train_them(quantized):
    groups = (TrainSettings(), DataSettings(), ModelSettings(**quantized), LoraSettings(),
              AdaLoraSettings())  # fmt: skip
    chat = Settings(*groups, trains=False).completed({})
    assert chat.quantization == next(iter(quantized))
    assert chat.differing(json.loads(chat.as_json())) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": ModelSettings(load_in_8bit=True, load_in_4bit=True), **SWITCHES["lora"]},
            "load_in_8bit and load_in_4bit exclude each other",
        ),
        (
            {"model": ModelSettings(quantization_bit=8, load_in_4bit=True), **SWITCHES["lora"]},
            "quantization_bit and load_in_4bit exclude each other",
        ),
        (
            {
                "model": ModelSettings(quantization_bit=8),
                "lora": LoraSettings(with_lora=True, use_dora=True),
            },
            "use_dora needs the unquantised weights",
        ),
        (
            {
                "model": ModelSettings(load_in_8bit=True),
                "enable_deepspeed": True,
                **SWITCHES["lora"],
            },
            "load_in_8bit can't be split by DeepSpeed",
        ),
        ({"enable_deepspeed": True, **SWITCHES["adalora"]}, "AdaLoRA allots ranks"),
    ],
)
def test_pairs_that_cannot_work_are_refused_with_the_reason(changes, message):
    with pytest.raises(ToolkitError, match=message):
        settings(**changes)


@pytest.mark.parametrize("method", ["full", *SWITCHES])
def test_each_method_fills_in_its_learning_rate_and_3_epochs(method):
    done = settings(**SWITCHES.get(method, {})).completed({})
    assert done.train.learning_rate == DEFAULT_LEARNING_RATES[method]
    assert done.train.max_epochs == 3
    assert (done.model.prefix_projection, done.model.quantization_bit) == (False, 0)


def test_training_from_scratch_fills_in_its_own_rate_and_24_epochs():
    done = settings(model_name_or_path="").completed({})
    assert (done.train.learning_rate, done.train.max_epochs) == (3e-3, 24)


def test_what_is_set_is_not_filled_in_even_if_it_is_0():
    config = {"pre_seq_len": 8, "quantization_bit": 4, "prefix_projection": True}
    model = ModelSettings(pre_seq_len=2, quantization_bit=0, prefix_projection=False)
    done = settings(model=model, learning_rate=0.0, max_epochs=1).completed(config)
    assert (done.train.learning_rate, done.train.max_epochs) == (0.0, 1)
    assert done.model == model


def test_the_file_of_config_name_chooses_the_method_and_so_the_rate():
    done = settings().completed({"pre_seq_len": 8, "quantization_bit": 4, "num_layers": 28})
    assert done.method == "ptuning" and done.quantization == "quantization_bit"
    assert done.train.learning_rate == DEFAULT_LEARNING_RATES["ptuning"]


def test_filling_in_twice_changes_nothing():
    config = {"pre_seq_len": 8, "prefix_projection": True}
    once = settings().completed(config)
    assert once.completed(config) == once == once.completed({})


def test_a_projection_without_virtual_tokens_is_refused():
    with pytest.raises(ToolkitError, match="only with pre_seq_len"):
        settings(model=ModelSettings(prefix_projection=True)).completed({})


def test_the_file_of_config_name_is_held_to_the_exclusions_too():
    with pytest.raises(ToolkitError, match="exclude each other"):
        settings(lora=LoraSettings(with_lora=True)).completed({"pre_seq_len": 8})


def test_settings_differ_by_full_names_and_only_where_the_result_does():
    mine = settings(scheduler_type="CAWR", scheduler={"T_mult": 2.0}).completed({})
    stored = json.loads(mine.as_json())
    assert mine.differing(stored) == []
    for name in ("output_dir", "save_dir", "test_file", "resume", "save_every_steps",
                 "rank_timeout_seconds"):  # fmt: skip
        assert name in stored
        stored[name] = "other"
    assert mine.differing(stored) == []
    stored["seed"] = 1
    stored["lora_info_args"]["r"] = 4
    stored["scheduler"] = {}
    stored["of_another_version"] = 1
    expected = ["lora_info_args.r", "of_another_version", "scheduler.T_mult", "seed"]
    assert mine.differing(stored) == expected


def test_what_an_epoch_holds_is_part_of_a_run():
    stored = json.loads(settings().as_json())
    other = settings(train_file_weights=[2.0], drop_last=True)
    assert other.differing(stored) == ["drop_last", "train_file_weights"]


def test_a_run_from_before_a_setting_goes_on_while_it_is_at_its_default():
    stored = json.loads(settings().as_json())
    for name in ("train_file_weights", "drop_last", "test_file", "strategy"):
        del stored[name]
    assert settings().differing(stored) == []
    assert settings(drop_last=True).differing(stored) == ["drop_last"]
    changed = settings(data=DataSettings(strategy="double_sliding"))
    assert changed.differing(stored) == ["strategy"]


def test_a_run_from_before_packing_goes_on_without_it():
    stored = json.loads(settings().as_json())
    del stored["packing"], stored["fused_kernels"]
    assert settings().differing(stored) == ["fused_kernels", "packing"]
    assert settings(packing=False, fused_kernels=False).differing(stored) == []


@pytest.mark.parametrize(("value", "name"), [(True, "full"), (False, "none")])
def test_what_is_recomputed_has_a_name_beside_its_truth_value(value, name):
    stored = json.loads(settings(gradient_checkpointing=value).as_json())
    assert settings(gradient_checkpointing=name).differing(stored) == []
    assert settings(gradient_checkpointing="selective").differing(stored) != []
