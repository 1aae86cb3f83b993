"""Four sources of settings in one order, and refusals in one line."""

import json
import re
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import data_utils
from chatglm.command_line import parse_settings, run_script
from chatglm.errors import ToolkitError
from chatglm.run_settings import Settings
from chatglm.settings import ChatSettings, LoraSettings, TrainSettings

ROOT = Path(__file__).parents[1]


def parse(*argv, edited=None):
    edited = data_utils.train_info_args if edited is None else edited
    groups = [(TrainSettings, edited, "the dict")]
    return parse_settings(groups, list(argv), description="test")[0]


def parse_all(*argv):
    return Settings(*parse_settings(data_utils.GROUPS, list(argv), description="test"))


def parse_file(tmp_path, content, *argv):
    path = tmp_path / "run.yaml"
    path.write_text(content, encoding="utf-8")
    return parse_all("--config", str(path), *argv)


def test_without_arguments_the_shipped_values_are_the_settings():
    assert parse_all() == Settings(*(kind() for kind, _, _ in data_utils.GROUPS))


def test_every_setting_has_a_line_of_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    groups = [*data_utils.GROUPS, (ChatSettings, {}, "chat")]
    with pytest.raises(SystemExit) as stop:
        parse_settings(groups, ["--help"], description="test")
    lines = capsys.readouterr().out.split("\n")
    assert stop.value.code == 0
    for group, _, _ in groups:
        section = f"{group.section}." if hasattr(group, "section") else ""
        for name in asdict(group()):
            flag = f"  --{section}{name}"
            (at,) = [i for i, line in enumerate(lines) if re.match(rf"{flag}[ ,]", line)]
            shown = " ".join(lines[at : at + 2]).partition("(type:")[0].strip()
            said = shown.split("  ")[-1].strip()
            assert said and not said.startswith("--"), f"{section}{name} has no help"


@pytest.mark.parametrize("flag_first", [False, True])
def test_later_sources_win_wherever_the_flag_stands(tmp_path, flag_first):
    config = tmp_path / "run.yaml"
    config.write_text("seed: 3\nmax_epochs: 3\n")
    sources = [["--config", str(config)], ["--max_epochs", "4"]]
    argv = [*sources[flag_first], *sources[not flag_first]]
    found = parse(*argv, edited={"seed": 2, "max_epochs": 2, "warmup_steps": 2})
    expected = {"max_epochs": 4, "seed": 3, "warmup_steps": 2, "max_seq_length": 1024}
    assert {name: getattr(found, name) for name in expected} == expected


def test_a_section_is_set_by_flags_and_by_a_section_of_the_file(tmp_path):
    assert parse_all("--lora_info_args.r", "4").lora == LoraSettings(r=4)
    content = "lora_info_args:\n  r: 4\n  bias: all\nseed: 1\n"
    found = parse_file(tmp_path, content, "--lora_info_args.r=6")
    assert found.lora == LoraSettings(r=6, bias="all") and found.train.seed == 1


@pytest.mark.parametrize("name", ["lora_info_args.rank", "lora_info_args.R", "lora.r"])
def test_an_unknown_flag_of_a_section_is_refused_with_the_nearest_name(name):
    with pytest.raises(ToolkitError, match=rf"command line: .*'{name}'.*mean 'lora_info_args\.r'"):
        parse_all(f"--{name}", "4")


@pytest.mark.parametrize(
    "content", ["lora_info_args: {rank: 4}", "lora_info_args: 4", "lora_info_arg: {r: 4}"]
)
def test_an_unknown_name_of_a_section_is_refused_with_the_nearest_name(tmp_path, content):
    with pytest.raises(ToolkitError, match=r"run\.yaml: .*mean 'lora_info_args\.r'"):
        parse_file(tmp_path, content)


def test_a_switch_alone_means_true():
    argv = ("--model_name_or_path", "w", "--lora_info_args.with_lora", "--seed", "1", "--resume")
    found = parse_all(*argv)
    assert found.lora.with_lora is True and found.train.resume is True and found.train.seed == 1
    values = {"true": True, "false": False, "null": None}
    for value, expected in values.items():
        assert parse("--resume", value).resume is expected
        assert parse(f"--resume={value}").resume is expected
    assert parse().resume is None


def test_only_a_switch_may_stand_alone():
    with pytest.raises(ToolkitError, match="seed: expected one argument"):
        parse("--seed", "--resume")


def test_a_single_value_for_a_list_is_told_how_to_give_one():
    with pytest.raises(ToolkitError, match=r"train_file.*mine\.json; give a list, .*--NAME\+ a"):
        parse("--train_file", "mine.json")


def test_a_list_is_given_whole_or_appended_to():
    assert parse("--train_file", '["a", "b"]').train_file == ["a", "b"]
    assert parse("--train_file+", "c", edited={"train_file": ["a"]}).train_file == ["a", "c"]


def test_the_settings_json_of_a_run_is_a_config_of_the_next(tmp_path):
    run = parse_all(
        "--seed=5", "--optimizer_betas=[0.8, 0.9]", "--model_name_or_path=./weights",
        "--scheduler_type=CAWR", '--scheduler={"T_mult": 2}', "--quantization_bit=4",
        "--adalora_info_args.with_lora", '--adalora_info_args.target_modules=["dense"]',
    ).completed({})  # fmt: skip
    path = tmp_path / "settings.json"
    path.write_text(run.as_json(), encoding="utf-8")
    again = parse_all("--config", str(path))
    assert again == run
    assert again.completed({}) == run and again.differing(json.loads(run.as_json())) == []


def test_an_unknown_flag_is_refused_with_the_nearest_name():
    with pytest.raises(ToolkitError, match=r"'learning_rat'.*mean 'learning_rate'"):
        parse("--learning_rat", "1")
    with pytest.raises(ToolkitError, match=r"'learning_rat'.*mean 'learning_rate'"):
        parse("--learning_rat=1")


def test_an_unknown_dict_key_is_refused_with_the_nearest_name():
    with pytest.raises(ToolkitError, match=r"the dict: .*'max_epoch'.*mean 'max_epochs'"):
        parse(edited={"max_epoch": 1})
    groups = [(LoraSettings, {"rank": 1}, "lora_info_args in data_utils.py")]
    with pytest.raises(ToolkitError, match=r"in data_utils\.py: .*mean 'lora_info_args\.r'"):
        parse_settings(groups, [], description="test")


@pytest.mark.parametrize("content", ["max_epoch: 1\n", "{max_epoch: 1}"])
def test_an_unknown_config_key_is_refused_with_file_and_nearest_name(tmp_path, content):
    with pytest.raises(ToolkitError, match=r"run\.yaml: .*'max_epoch'.*mean 'max_epochs'"):
        parse_file(tmp_path, content)


@pytest.mark.parametrize(
    "argv",
    [
        ["--learning_rate", "fast"],
        ["--learning_rate"],
        ["--learning_rate", "-1"],
        ["--learning_rate", "nan"],
        ["--max_epochs", "0"],
        ["--max_steps", "0"],
        ["--train_batch_size", "1.5"],
        ["--scheduler_type", "x"],
        ["--train_file", "[]"],
        ["--resume", "perhaps"],
        ["--config"],
        ["--config", "/no/such/file"],
        ["stray"],
    ],
)
def test_a_bad_value_is_a_toolkit_error_of_one_line(argv):
    with pytest.raises(ToolkitError) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["- 1", "a: [", "seed: x", "1: 2", "seed: null", "lora_info_args: {r: null}"]
)
def test_a_config_of_another_form_is_a_toolkit_error_of_one_line(tmp_path, content):
    with pytest.raises(ToolkitError) as caught:
        parse_file(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_a_dict_value_of_a_wrong_type_is_a_toolkit_error():
    for edited in ({"max_epochs": "x"}, {"train_file": "one.json"}, {"seed": None}):
        with pytest.raises(ToolkitError):
            parse(edited=edited)


SCRIPTS = ("data_utils", "train", "evaluate", "infer", "infer_finetuning", "infer_lora_finetuning")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_ends_a_users_mistake_with_2_and_one_line(script, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--learning_rat", "1"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: ") and "'learning_rat'" in err


def test_an_interrupted_script_ends_with_130_and_a_bug_with_its_traceback(capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_script(interrupted)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"

    def broken(_):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_script(broken)
