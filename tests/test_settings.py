"""Settings as typed groups: what is shipped, and what each allows."""

import math
from dataclasses import asdict

import pytest

import data_utils
from chatglm.errors import ToolkitError
from chatglm.settings import (
    AdaLoraSettings,
    DataSettings,
    LoraSettings,
    ModelSettings,
    TrainSettings,
)


@pytest.mark.parametrize("group", data_utils.GROUPS, ids=lambda group: group[0].__name__)
def test_the_shipped_values_equal_the_typed_defaults(group):
    kind, edited, _ = group
    assert edited == asdict(kind())


def test_every_group_of_settings_is_shipped():
    shipped = [kind for kind, _, _ in data_utils.GROUPS]
    assert shipped == [TrainSettings, DataSettings, ModelSettings, LoraSettings, AdaLoraSettings]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainSettings, {"seed": -1}, "seed -1"),
        (TrainSettings, {"seed": 2**32}, "allowed is 0 to 4294967295"),
        (TrainSettings, {"adam_epsilon": -1.0}, "adam_epsilon"),
        (TrainSettings, {"learning_rate": float("nan")}, "learning_rate nan"),
        (TrainSettings, {"optimizer_betas": (2.0, 3.0)}, "optimizer_betas"),
        (TrainSettings, {"train_file": []}, "train_file is empty"),
        (
            TrainSettings,
            {"train_file": ["a", "b"], "train_file_weights": [1.0]},
            "has 1 for the 2 entries of train_file: give each entry one",
        ),
        (TrainSettings, {"train_file_weights": [0.0]}, r"weights \[0.0\]: each is above 0"),
        (TrainSettings, {"train_file_weights": [math.inf]}, "train_file_weights .*inf.* finite"),
        (TrainSettings, {"train_file_weights": [math.nan]}, "train_file_weights .*nan"),
        (TrainSettings, {"max_steps": 0}, "max_steps 0"),
        (TrainSettings, {"max_steps": -2}, "max_steps -2"),
        (TrainSettings, {"mix_file": ["a"], "mix_ratio": 1.0}, "mix_ratio 1.0"),
        (TrainSettings, {"mix_file": ["a"]}, "set both"),
        (TrainSettings, {"mix_ratio": 0.5}, "set both"),
        (TrainSettings, {"save_every_steps": -2}, "save_every_steps -2"),
        (
            TrainSettings,
            {"scheduler_type": "ReduceLROnPlateau", "eval_file": []},
            "follows the dev loss: set eval_file",
        ),
        (
            TrainSettings,
            {"early_stopping_patience": 1, "eval_file": []},
            "early_stopping_patience needs a dev loss",
        ),
        (TrainSettings, {"eval_every_steps": 1, "eval_file": []}, "eval_every_steps needs a dev"),
        (DataSettings, {"ensure_answer_min_length": 0}, "ensure_answer_min_length 0"),
        (DataSettings, {"strategy": "single_sliding", "sliding_size": 0}, "sliding_size 0"),
        (DataSettings, {"sliding_size": 8}, "sliding_size 8 has no effect with .* at null"),
        (DataSettings, {"p": -1}, "p -1 has no effect with strategy truncation: leave it at 1"),
        (
            DataSettings,
            {"strategy": "double_sliding", "ensure_answer_min_length": 2},
            "ensure_answer_min_length 2 has no effect with strategy double_sliding",
        ),
        (ModelSettings, {"pre_seq_len": 0}, "pre_seq_len 0"),
        (LoraSettings, {"r": 0}, r"lora_info_args\.r 0"),
        (LoraSettings, {"lora_dropout": 1.0}, r"lora_info_args\.lora_dropout"),
        (LoraSettings, {"lora_alpha": 0.0}, r"lora_info_args\.lora_alpha"),
        (LoraSettings, {"target_modules": []}, "target_modules is empty"),
        (LoraSettings, {"target_modules": ["query_key"]}, "Did you mean 'query_key_value'"),
        (AdaLoraSettings, {"target_r": 9, "init_r": 8}, "target_r 9 is above init_r 8"),
        (AdaLoraSettings, {"beta1": 1.0}, r"adalora_info_args\.beta1 1\.0"),
        (AdaLoraSettings, {"deltaT": 0}, r"adalora_info_args\.deltaT 0"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(kind, values, message):
    with pytest.raises(ToolkitError, match=message):
        kind(**values)
