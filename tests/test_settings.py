"""Settings: four sources in one order, and refusals in one line."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import data_utils
from chatglm.errors import ToolkitError
from chatglm.settings import (
    ChatSettings,
    DataSettings,
    TrainSettings,
    parse_settings,
    settings_as_json,
)

ROOT = Path(__file__).parents[1]


def parse(*argv, edited=None):
    edited = data_utils.train_info_args if edited is None else edited
    groups = [(TrainSettings, edited, "the dict")]
    return parse_settings(groups, list(argv), description="test")[0]


def test_the_shipped_dicts_equal_the_typed_defaults():
    assert data_utils.train_info_args == asdict(TrainSettings())
    assert data_utils.data_conf == asdict(DataSettings())
    train, data = parse_settings(data_utils.GROUPS, [], description="test")
    assert (train, data) == (TrainSettings(), DataSettings())


def test_every_setting_has_a_line_of_help(capsys):
    groups = [*data_utils.GROUPS, (ChatSettings, {}, "chat")]
    with pytest.raises(SystemExit) as stop:
        parse_settings(groups, ["--help"], description="test")
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for group in (TrainSettings, DataSettings, ChatSettings):
        for name in asdict(group()):
            assert f"--{name}" in shown


@pytest.mark.parametrize("flag_first", [False, True])
def test_later_sources_win_wherever_the_flag_stands(tmp_path, flag_first):
    config = tmp_path / "run.yaml"
    config.write_text("seed: 3\nmax_epochs: 3\n")
    sources = [["--config", str(config)], ["--max_epochs", "4"]]
    argv = [*sources[flag_first], *sources[not flag_first]]
    found = parse(*argv, edited={"seed": 2, "max_epochs": 2, "warmup_steps": 2})
    expected = {"max_epochs": 4, "seed": 3, "warmup_steps": 2, "max_seq_length": 1024}
    assert {name: getattr(found, name) for name in expected} == expected


def test_the_settings_json_of_a_run_is_a_config_of_the_next(tmp_path):
    path = tmp_path / "settings.json"
    groups = (TrainSettings(seed=5, optimizer_betas=(0.8, 0.9)), DataSettings())
    path.write_text(settings_as_json(*groups), encoding="utf-8")
    again = parse_settings(data_utils.GROUPS, ["--config", str(path)], description="test")
    assert tuple(again) == groups
    assert json.loads(path.read_text())["seed"] == 5


def test_an_unknown_flag_is_refused_with_the_nearest_name():
    with pytest.raises(ToolkitError, match=r"'learning_rat'.*mean 'learning_rate'"):
        parse("--learning_rat", "1")
    with pytest.raises(ToolkitError, match=r"'learning_rat'.*mean 'learning_rate'"):
        parse("--learning_rat=1")


def test_an_unknown_dict_key_is_refused_with_the_nearest_name():
    with pytest.raises(ToolkitError, match=r"the dict: .*'max_epoch'.*mean 'max_epochs'"):
        parse(edited={"max_epoch": 1})


@pytest.mark.parametrize("content", ["max_epoch: 1\n", "{max_epoch: 1}"])
def test_an_unknown_config_key_is_refused_with_file_and_nearest_name(tmp_path, content):
    config = tmp_path / "run.yaml"
    config.write_text(content)
    with pytest.raises(ToolkitError, match=r"run\.yaml: .*'max_epoch'.*mean 'max_epochs'"):
        parse("--config", str(config))


@pytest.mark.parametrize(
    "argv",
    [
        ["--learning_rate", "fast"],
        ["--learning_rate"],
        ["--learning_rate", "-1"],
        ["--max_epochs", "0"],
        ["--max_steps", "0"],
        ["--train_batch_size", "1.5"],
        ["--scheduler_type", "x"],
        ["--train_file", "[]"],
        ["--config"],
        ["--config", "/no/such/file"],
        ["stray"],
    ],
)
def test_a_bad_value_is_a_toolkit_error_of_one_line(argv):
    with pytest.raises(ToolkitError) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["- 1", "a: [", "seed: x", "1: 2"])
def test_a_config_of_another_form_is_a_toolkit_error(tmp_path, content):
    config = tmp_path / "run.yaml"
    config.write_text(content)
    with pytest.raises(ToolkitError):
        parse("--config", str(config))


def test_a_dict_value_of_a_wrong_type_is_a_toolkit_error():
    for edited in ({"max_epochs": "x"}, {"train_file": "one.json"}, {"seed": None}):
        with pytest.raises(ToolkitError):
            parse(edited=edited)


def test_null_is_refused_where_a_number_is_needed(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("seed: null\n")
    with pytest.raises(ToolkitError):
        parse("--config", str(config))


@pytest.mark.parametrize(
    "argv", [["--seed", "-1"], ["--adam_epsilon", "-1"], ["--optimizer_betas", "[2, 3]"]]
)
def test_what_the_optimizer_or_the_seed_cannot_take_is_refused_early(argv):
    with pytest.raises(ToolkitError):
        parse(*argv)


def test_scripts_end_a_users_mistake_with_2_and_one_line():
    scripts = ("data_utils.py", "train.py", "infer.py", "infer_finetuning.py")
    running = [
        subprocess.Popen(
            [sys.executable, script, "--learning_rat", "1"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for script in scripts
    ]
    for script, process in zip(scripts, running, strict=True):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2, (script, err)
        assert out == "" and len(err.splitlines()) == 1, (script, out, err)
        assert err.startswith("error: ") and "'learning_rat'" in err
