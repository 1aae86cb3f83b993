"""A run that is cut off goes on to the very bytes that it would have come to undisturbed."""

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import train
from chatglm.callbacks import LossCurve, SaveResume
from chatglm.errors import ToolkitError
from chatglm.training import ChatGLMTraining
from chatglm.weights import load_pretrained
from tests.conftest import fill
from tests.tiny_run import (
    ROOT,
    arguments,
    leftovers,
    stay_on_the_cpu,
    train_in_child,
    weights,
    write_inputs,
)

TARGETS = '["query_key_value", "dense"]'
METHODS = {
    "full": {"gradient_accumulation_steps": 2, "eval_every_steps": 2, "max_epochs": 2},
    "lora": {
        "max_epochs": 3,
        "lora_info_args.with_lora": "true",
        "lora_info_args.r": 2,
        "lora_info_args.lora_dropout": 0.1,
        "lora_info_args.target_modules": TARGETS,
    },
    "ptuning": {"max_epochs": 3, "pre_seq_len": 4, "eval_every_steps": 3},
    "adalora": {
        "max_epochs": 3,
        "adalora_info_args.with_lora": "true",
        "adalora_info_args.target_r": 2,
        "adalora_info_args.init_r": 4,
        "adalora_info_args.target_modules": TARGETS,
    },
}


class CutOffError(Exception):
    """Stands for a kill at a moment that a test chooses."""


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    """No GPU, and no picture, which would take half of the time of so short a run."""
    with pytest.MonkeyPatch.context() as patch:
        stay_on_the_cpu(patch)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setattr(LossCurve, "draw", lambda self: None)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def base(inputs):
    """Weights to tune, out of a short training."""
    train.main(arguments(inputs, inputs / "base", eval_file="[]"))
    return inputs / "base" / "last"


@pytest.fixture(scope="module")
def commands(inputs, base):
    """commands(method, save_dir, **settings): the arguments of a run that saves every step."""

    def command(method, save_dir, **settings):
        tuned = {} if method == "full" else {"model_name_or_path": base, "config_name": None}
        options = {"save_every_steps": 1, **METHODS[method], **tuned, **settings}
        return arguments(inputs, save_dir, **options)

    return command


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, commands):
    """undisturbed(method, **settings): the weights of a run without a cut, made once."""
    made = {}

    def run(method, **settings):
        key = json.dumps([method, settings], sort_keys=True, default=str)
        if key not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            train.main(commands(method, folder, **settings))
            made[key] = weights(folder)
            assert len(made[key]) == 2
        return made[key]

    return run


@pytest.fixture
def cut_off(monkeypatch):
    """cut_off(argv, at): train until so many batches are done in this call."""

    def run(argv, at):
        def count(self, batch, batch_index):
            nonlocal seen
            if seen == at:
                raise CutOffError
            seen += 1
            start(self, batch, batch_index)

        seen = 0
        with monkeypatch.context() as patch:
            patch.setattr(ChatGLMTraining, "on_train_batch_start", count)
            with pytest.raises(CutOffError):
                train.main(argv)

    start = ChatGLMTraining.on_train_batch_start
    return run


# Kills.


def wait_for_news(path, process, *, old):
    """Until the file is another one than before, or the process has ended."""
    deadline = time.monotonic() + 60
    while process.is_alive() and (not path.exists() or path.stat().st_ino == old):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill_at_random(argv, folder, randomness, *, log):
    """SIGKILL in a random moment after the run has written its first resume/ ; True if it hit."""
    context = multiprocessing.get_context("forkserver")  # imports once, for all of them
    context.set_forkserver_preload(["train", "tests.tiny_run"])
    written = folder / "resume" / "run.json"
    old = written.stat().st_ino if written.exists() else None
    process = context.Process(target=train_in_child, args=(argv, str(log)))
    process.start()
    wait_for_news(written, process, old=old)
    time.sleep(randomness.uniform(0, 0.15))
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
    return process.exitcode != 0


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(
    method, tmp_path, commands, undisturbed
):
    randomness = random.Random(f"{method} 1")
    folder = tmp_path / "saved"
    longer = {"max_epochs": 4}
    argv = commands(method, folder, **longer)
    log, attempts = tmp_path / "log", 3 if method == "full" else 2
    killed = [kill_at_random(argv, folder, randomness, log=log) for _ in range(attempts)]
    assert killed[0]
    train.main(argv)
    assert weights(folder) == undisturbed(method, **longer)
    assert not leftovers(folder) and not (folder / "resume").exists()


def test_the_script_itself_can_be_killed_and_gone_on_with(tmp_path, commands, undisturbed, capsys):
    folder = tmp_path / "saved"
    argv = [sys.executable, "train.py", *commands("full", folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + 120
        while not (folder / "resume" / "run.json").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    train.main(argv[2:])
    assert "resume: going on with the unfinished run" in capsys.readouterr().out
    assert weights(folder) == undisturbed("full")


# Cuts at chosen moments.


PATIENT = {
    "scheduler_type": "ReduceLROnPlateau",
    "scheduler": '{"factor": 0.5, "patience": 0}',
    "early_stopping_patience": 2,
    "learning_rate": 0.1,  # too much: the dev loss goes up and down
    "max_epochs": 5,
}
BY_EPOCHS = {"eval_every_steps": None}
VARIANTS = {  # where to cut, of 6 batches and 3 optimizer steps an epoch, and the settings
    "a dev run each epoch": ((4, 5), {**BY_EPOCHS, "gradient_accumulation_steps": 1}),
    "dev runs between the saves": ((6, 7), {"eval_every_steps": 3, "save_every_steps": 2}),
    "dev runs at the saves": ((4, 7), {"save_every_steps": 2, "learning_rate": 0.1}),
    "plateau and patience by epochs": ((6, 7), {**BY_EPOCHS, **PATIENT}),
    "plateau and patience by steps": ((4, 7), PATIENT),
    "saves by epochs": ((7,), {"save_every_steps": 0}),
    "steps that end in an epoch": ((6, 7), {"max_steps": 5}),
    "steps that end in an epoch, dev runs by epochs": ((6, 8), {**BY_EPOCHS, "max_steps": 5}),
    "no dev set": ((6, 7), {**BY_EPOCHS, "eval_file": "[]"}),
    "weights and drop_last": ((3, 7), {"train_file_weights": "[1.6]", "drop_last": "true"}),
    "a schedule of cycles": ((3, 7), {"scheduler_type": "CAWR", "warmup_steps": 2}),
}
CUTS = [
    pytest.param(name, at, marks=pytest.mark.slow if at != cuts[0] else ())
    for name, (cuts, _) in VARIANTS.items()
    for at in cuts
]


@pytest.mark.parametrize(("variant", "at"), CUTS)
def test_a_run_cut_off_after_a_batch_ends_as_if_it_had_not_been(
    variant, at, tmp_path, commands, undisturbed, cut_off
):
    _, settings = VARIANTS[variant]
    argv = commands("full", tmp_path, **settings)
    cut_off(argv, at)
    train.main(argv)
    assert weights(tmp_path) == undisturbed("full", **settings)


def test_a_run_cut_off_twice_and_again_in_the_same_epoch_ends_as_if_it_had_not_been(
    tmp_path, commands, undisturbed, cut_off, inputs
):
    mix = {"mix_file": json.dumps([str(inputs / "mix.json")]), "mix_ratio": 0.4}
    argv = commands("full", tmp_path, **mix)
    for at in (3, 2, 4, 5):
        cut_off(argv, at)
    train.main(argv)
    assert weights(tmp_path) == undisturbed("full", **mix)


def test_a_run_that_went_on_reports_every_step_and_epoch_once_and_as_if_it_had_not_been_cut(
    tmp_path, commands, cut_off, monkeypatch, capsys
):
    drawn = []
    monkeypatch.setattr(LossCurve, "draw", lambda self: drawn.append((self.train, self.dev)))
    argv = commands("lora", tmp_path / "cut")
    cut_off(argv, 3)
    cut_off(argv, 4)
    train.main(argv)
    after_cuts, told = drawn[-1], re.findall(r"epoch \d: .*", capsys.readouterr().out)
    train.main(commands("lora", tmp_path / "whole"))
    assert after_cuts == drawn[-1] and len(after_cuts[0]) == 15
    assert told == re.findall(r"epoch \d: .*", capsys.readouterr().out) and len(told) == 3


@pytest.fixture
def interrupted(tmp_path, commands, cut_off):
    """(folder, arguments) of a run that was cut off in its second epoch."""
    argv = commands("full", tmp_path / "saved")
    cut_off(argv, 7)
    return tmp_path / "saved", argv


def damage_new(resume):
    """A kill while the next one is written."""
    shutil.copytree(resume, f"{resume}.part")
    os.truncate(f"{resume}.part/state.ckpt", 1000)
    os.remove(f"{resume}.part/run.json")


def damage_between(resume):
    """A kill between the two renames."""
    shutil.copytree(resume, f"{resume}.part")
    os.rename(resume, f"{resume}.old")


def damage_after(resume):
    """A kill before the older one is removed."""
    shutil.copytree(resume, f"{resume}.old")


@pytest.mark.parametrize("damage", [damage_new, damage_between, damage_after])
def test_a_kill_while_resume_is_written_loses_nothing(interrupted, undisturbed, damage, capsys):
    folder, argv = interrupted
    damage(folder / "resume")
    capsys.readouterr()
    train.main(argv)
    assert "resume: going on with the unfinished run" in capsys.readouterr().out
    assert weights(folder) == undisturbed("full")
    assert not leftovers(folder)


def test_what_a_kill_left_half_written_is_gone_in_the_end_if_nothing_is_saved_again(interrupted):
    folder, argv = interrupted
    damage_new(folder / "resume")
    train.main([*argv, "--save_every_steps=-1"])
    assert not leftovers(folder)


# What may not go on.


def test_another_setting_is_refused_by_its_full_name(interrupted):
    folder, argv = interrupted
    before = (folder / "resume" / "state.ckpt").read_bytes()
    changes = ["--seed=1", "--lora_info_args.r=4", "--learning_rate=0.1"]
    names = r"other learning_rate, lora_info_args\.r, seed: give that back"
    with pytest.raises(ToolkitError, match=names):
        train.main([*argv, *changes])
    assert (folder / "resume" / "state.ckpt").read_bytes() == before


def test_changed_data_is_refused(interrupted, inputs, undisturbed):
    folder, argv = interrupted
    path = inputs / "train.json"
    content = path.read_text()
    path.write_text(content + content.splitlines(keepends=True)[0])
    try:
        with pytest.raises(ToolkitError, match="unfinished run with other data: give"):
            train.main(argv)
    finally:
        path.write_text(content)
    train.main(argv)
    assert weights(folder) == undisturbed("full")


def test_settings_without_effect_on_the_result_may_change(interrupted, undisturbed):
    folder, argv = interrupted
    train.main([*argv, "--save_every_steps=0", "--resume"])
    assert weights(folder) == undisturbed("full")


def test_resume_false_starts_anew_and_drops_the_unfinished_run(
    interrupted, undisturbed, cut_off, capsys
):
    folder, argv = interrupted
    cut_off([*argv, "--resume=false", "--seed=1"], 1)
    assert not (folder / "resume").exists()
    capsys.readouterr()
    train.main([*argv, "--resume=false"])
    assert "going on" not in capsys.readouterr().out
    assert weights(folder) == undisturbed("full")


def test_resume_true_without_an_unfinished_run_is_refused(tmp_path, commands):
    with pytest.raises(ToolkitError, match=r"--resume: .*resume does not exist; leave resume out"):
        train.main(commands("full", tmp_path, resume="true"))


def test_a_finished_run_starts_anew(tmp_path, commands, undisturbed, capsys):
    argv = commands("full", tmp_path)
    for _ in range(2):
        train.main(argv)
        assert "going on" not in capsys.readouterr().out
        assert weights(tmp_path) == undisturbed("full")


def test_a_run_that_may_not_save_leaves_no_resume(tmp_path, commands, cut_off, capsys):
    argv = commands("full", tmp_path, save_every_steps=-1)
    cut_off(argv, 7)
    assert not (tmp_path / "resume").exists() and (tmp_path / "last").exists()


@pytest.mark.parametrize("name", ["state.ckpt", "run.json"])
def test_a_damaged_resume_is_a_line_that_says_what_to_do(interrupted, name):
    folder, argv = interrupted
    os.truncate(folder / "resume" / name, 100)
    with pytest.raises(ToolkitError, match=r"resume.*damaged.*--resume false"):
        train.main(argv)


# A full disk.


def readable(folder):
    """The weights and the resume state can be loaded whole."""
    model, _ = load_pretrained(str(folder / "last"), device="cpu")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    load_file(folder / "best" / "model.safetensors")
    state = torch.load(folder / "resume" / "state.ckpt", weights_only=False)
    assert state["state_dict"] and json.loads((folder / "resume" / "run.json").read_text())


@pytest.mark.parametrize(
    ("leave", "cut"), [(300_000, "best|last"), (1_500_000, "resume"), (0, r"\w+")]
)
def test_a_disk_that_fills_up_ends_in_a_line_and_the_same_command_goes_on(
    small_disk, commands, undisturbed, monkeypatch, leave, cut
):
    def fill_in_the_second_epoch(self, batch, batch_index):
        if (self.current_epoch, batch_index) == (1, 3):
            fill(small_disk, leave=leave)
        start(self, batch, batch_index)

    start = ChatGLMTraining.on_train_batch_start
    folder = small_disk / "saved"
    options = {"eval_every_steps": None, "save_every_steps": 0, "max_epochs": 3}
    argv = commands("full", folder, **options)
    with monkeypatch.context() as patch:
        patch.setattr(ChatGLMTraining, "on_train_batch_start", fill_in_the_second_epoch)
        with pytest.raises(ToolkitError, match=rf"saved/?({cut})?.*Make room") as caught:
            train.main(argv)
    assert "\n" not in str(caught.value)
    readable(folder)
    assert not leftovers(folder)
    (small_disk / "filler").unlink()
    train.main(argv)
    assert weights(folder) == undisturbed("full", **options)


def test_a_disk_that_fills_up_with_the_last_small_file_is_a_line_too(
    interrupted, undisturbed, monkeypatch
):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder, argv = interrupted
    with monkeypatch.context() as patch:
        patch.setattr("chatglm.callbacks.json.dump", full)
        with pytest.raises(ToolkitError, match=r"resume: could not be written .*No space left"):
            train.main(argv)
    readable(folder)
    assert not leftovers(folder)
    train.main(argv)
    assert weights(folder) == undisturbed("full")


def test_every_save_leaves_whole_folders_only(tmp_path, commands, monkeypatch):
    seen = []

    def look(self, trainer):
        save(self, trainer)
        seen.append(trainer.global_step)
        if trainer.global_step > 3:
            readable(tmp_path)
        assert not leftovers(tmp_path)

    save = SaveResume._save
    monkeypatch.setattr(SaveResume, "_save", look)
    options = {"save_every_steps": 2, "eval_every_steps": None, "max_epochs": 3}
    train.main(commands("full", tmp_path, **options))
    assert seen == [2, 3, 4, 6, 8]
