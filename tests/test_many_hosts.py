"""Whole trainings on several processes, devices and hosts come to the weights of one process.

A host is a network and process namespace of this machine (processes.two_hosts), so that addresses,
ports and process ids are its own. Each host has an own save_dir, as machines without a shared disk
have, unless a test says otherwise.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from .processes import ended, fork, free_port, two_hosts
from .tiny_run import ROOT, WEIGHT_FILES, arguments, train_in_child, write_inputs

# Adam divides by the size of the gradient, which hides a wrong factor and magnifies rounding; with
# an epsilon of 1 it is descent with momentum.
PLAIN_DESCENT = {"adam_epsilon": 1.0, "learning_rate": 0.3, "max_grad_norm": 0, "max_epochs": 2}
LORA = {
    "config_name": None,
    "lora_info_args.with_lora": "true",
    "lora_info_args.r": 2,
    "lora_info_args.lora_dropout": 0.0,
}
ZERO = {
    2: {"enable_deepspeed": "true", "deepspeed_config": "config/deepspeed.json"},
    3: {"enable_deepspeed": "true", "deepspeed_config": "config/deepspeed_offload.json"},
}
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
PRELOAD = ("train", "lightning", "deepspeed", "tests.tiny_run", "tests.test_many_hosts")


# Processes.


def start(argv, log, *, host=None, at_step=None, then=None, **environ):
    """train.py in a process; at a step it does `then`: "pause" or "fail"."""
    return fork(
        train_there, argv, str(log), host, {**ENVIRONMENT, **environ}, at_step, then,
        preload=PRELOAD,
    )  # fmt: skip


def train_there(argv, log, host, environ, at_step, then):
    if host:
        host.enter()
    os.setpgrp()
    os.environ.update(environ)
    os.chdir(ROOT)
    from chatglm.callbacks import LossCurve
    from chatglm.errors import ToolkitError
    from chatglm.training import ChatGLMTraining

    def on_train_batch_start(self, batch, batch_index):
        if self.global_step == at_step and then == "fail":
            raise ToolkitError("made to fail")
        if self.global_step == at_step:
            Path(f"{log}.paused").touch()
            time.sleep(600)
        usual(self, batch, batch_index)

    usual, ChatGLMTraining.on_train_batch_start = (
        ChatGLMTraining.on_train_batch_start, on_train_batch_start,
    )  # fmt: skip
    LossCurve.draw = lambda self: None  # half of the time of so short a run
    train_in_child(argv, log)


def codes(processes, *, within_seconds=60):
    """Their exit codes; None for one that has not ended in time."""
    deadline = time.monotonic() + within_seconds
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0.01))
    return [process.exitcode for process in processes]


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.is_alive() and time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.02)


def ranks_here(argv, log, **options):
    """Two processes of this host, as Lightning starts them, on one terminal."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    return [
        start(argv, log, **address, NODE_RANK="0", LOCAL_RANK=str(rank),
              **(options if rank == 1 else {}))
        for rank in range(2)
    ]  # fmt: skip


def ranks_there(hosts, argvs, folder, *, devices=1, **options):
    """`python train.py` on each host; options are those of the second."""
    address = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "6667"}
    return [
        start(argv, folder / f"log{rank}", host=host, **address, WORLD_SIZE=str(2 * devices),
              NODE_RANK=str(rank), **(options if rank == 1 else {}))
        for rank, (host, argv) in enumerate(zip(hosts, argvs, strict=True))
    ]  # fmt: skip


def errors(log):
    return [line for line in log.read_text().splitlines() if line.startswith("error: ")]


# Runs and what they leave.


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def command(inputs):
    """command(save_dir, **settings): the arguments of a run whose records stand beside save_dir."""

    def make(save_dir, **settings):
        options = {"output_dir": save_dir.parent / "output", **PLAIN_DESCENT, **settings}
        return arguments(inputs, save_dir, **options)

    return make


@pytest.fixture(scope="module")
def alone(tmp_path_factory, command):
    """alone(batch, **settings): save_dir of one process with that batch, trained once."""
    made = {}

    def run(batch, **settings):
        key = json.dumps([batch, settings], sort_keys=True, default=str)
        if key not in made:
            folder = tmp_path_factory.mktemp("alone")
            argv = command(folder / "saved", train_batch_size=batch, **settings)
            with ended([start(argv, folder / "log")]) as processes:
                assert codes(processes) == [0], (folder / "log").read_text()
            made[key] = folder / "saved"
        return made[key]

    return run


def tensors(folder):
    files = [folder / name for name in WEIGHT_FILES if (folder / name).exists()]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def difference(folder, other):
    """The largest of all tensors, each by its largest value."""
    found, expected = tensors(folder), tensors(other)
    assert found.keys() == expected.keys() and found
    return max(
        ((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item()
        for name in found
    )


def assert_same(save_dir, expected):
    """Weights and losses, up to the order of sums."""
    for name in ("best", "last"):
        assert difference(save_dir / name, expected / name) < 1e-6
    found, wanted = (
        json.loads((folder / "summary.json").read_text()) for folder in (save_dir, expected)
    )
    for name in ("train_loss", "dev_loss"):
        assert found[name] == pytest.approx(wanted[name], abs=2e-6)


def test_a_batch_of_another_size_gives_other_weights(alone):
    assert difference(alone(1) / "last", alone(2) / "last") > 1e-2


# Several hosts and devices.


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_hosts_train_as_one_process_with_twice_the_batch(method, tmp_path, command, alone):
    settings = {"max_steps": 7}  # a dev run follows, for which the ranks meet anew
    if method == "lora":
        settings |= {**LORA, "model_name_or_path": alone(2) / "last"}
    argvs = [
        command(tmp_path / f"host{n}" / "saved", train_batch_size=1, devices=1, **settings)
        for n in (0, 1)
    ]
    with two_hosts() as hosts, ended(ranks_there(hosts, argvs, tmp_path)) as processes:
        assert codes(processes) == [0, 0], (tmp_path / "log0").read_text()
    assert_same(tmp_path / "host0" / "saved", alone(2, **settings))
    assert not (tmp_path / "host1" / "saved").exists()


def test_two_hosts_of_two_devices_train_as_one_process(tmp_path, command, alone):
    argvs = [
        command(tmp_path / f"host{n}" / "saved", train_batch_size=1, devices=2) for n in (0, 1)
    ]
    with two_hosts() as hosts, ended(ranks_there(hosts, argvs, tmp_path, devices=2)) as processes:
        assert codes(processes) == [0, 0], (tmp_path / "log0").read_text()
    assert_same(tmp_path / "host0" / "saved", alone(4))
    said = [(tmp_path / f"log{n}").read_text().count("epoch 1: train loss") for n in (0, 1)]
    assert said == [1, 0]


@pytest.mark.slow
def test_torchrun_trains_as_one_process(tmp_path, command, alone):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, "train.py", *command(tmp_path / "saved", train_batch_size=1)],
        cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "saved", alone(2))
    assert done.stdout.count("epoch 1: train loss") == 1


def test_without_a_dev_set_the_ranks_agree_on_the_best_weights(tmp_path, command, alone):
    # The loss falls by less than by what the samples of a rank differ from epoch to epoch.
    settings = {"eval_file": "[]", "learning_rate": 0.01, "max_epochs": 4}
    argv = command(tmp_path / "saved", train_batch_size=1, devices=2, **settings)
    with ended(ranks_here(argv, tmp_path / "log")) as processes:
        assert codes(processes, within_seconds=20) == [0, 0], (tmp_path / "log").read_text()
    for name in ("best", "last"):
        assert difference(tmp_path / "saved" / name, alone(2, **settings) / name) < 1e-6


def build_there(argv, log):
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import data_utils

    data_utils.main(argv)


def test_processes_that_start_at_once_build_once(tmp_path, inputs):
    argv = arguments(inputs, tmp_path / "saved", output_dir=tmp_path / "output", train_file=None)
    logs = [str(tmp_path / f"log{n}") for n in range(3)]
    with ended([fork(build_there, argv, log, preload=PRELOAD) for log in logs]) as processes:
        assert codes(processes) == [0, 0, 0], [Path(log).read_text() for log in logs]
    said = "".join(Path(log).read_text() for log in logs)
    assert said.count("train: building") == said.count("dev: building") == 1


# Losses, errors, interrupts.


def test_a_host_that_is_lost_is_named_and_the_run_goes_on_from_its_last_save(
    tmp_path, command, alone
):
    options = {"train_batch_size": 1, "devices": 1, "save_every_steps": 1}
    folders = [tmp_path / f"host{n}" / "saved" for n in (0, 1)]
    argvs = [command(folder, rank_timeout_seconds=5, **options) for folder in folders]
    with two_hosts() as hosts:
        with ended(ranks_there(hosts, argvs, tmp_path, at_step=7, then="pause")) as processes:
            wait_for(tmp_path / "log1.paused", processes[1])
            processes[1].kill()
            assert codes(processes[:1], within_seconds=5 + 3) == [1]
        assert errors(tmp_path / "log0") == [
            f"error: rank 1 (host {hosts[1].address}) has not answered for 5 s; stopped."
            f" The same command goes on with what {folders[0]}/resume holds"
        ]
        (tmp_path / "log0").unlink()
        with ended(ranks_there(hosts, argvs, tmp_path)) as processes:
            assert codes(processes) == [1, 2]
        for n in (0, 1):
            (line,) = errors(tmp_path / f"log{n}")
            assert "the first machine goes on from step 7, this one from 0: give a save_dir" in line
        argvs[1] = command(folders[0], output_dir=tmp_path / "host1" / "output", **options)
        with ended(ranks_there(hosts, argvs, tmp_path)) as processes:
            assert codes(processes) == [0, 0], (tmp_path / "log1").read_text()
    assert "going on with the unfinished run" in (tmp_path / "log0").read_text()
    assert_same(folders[0], alone(2))
    assert not (folders[0] / "resume").exists()


@pytest.mark.parametrize(
    ("devices", "environ", "reason"),
    [
        (2, {"WORLD_SIZE": "3", "NODE_RANK": "0"}, "WORLD_SIZE=3: expected a multiple of the 2"),
        (1, {"WORLD_SIZE": "2"}, "2 machines, but NODE_RANK is not set"),
        (1, {"WORLD_SIZE": "2", "NODE_RANK": "2"}, "is 2: allowed is 0 to 1"),
    ],
)
def test_a_contradiction_ends_at_once_in_one_line(tmp_path, command, devices, environ, reason):
    address = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "6667"}
    argv = command(tmp_path / "saved", devices=devices)
    with ended([start(argv, tmp_path / "log", **address, **environ)]) as processes:
        assert codes(processes, within_seconds=20) == [2]
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.startswith("error: ") and reason in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]


def test_hosts_with_different_commands_or_data_do_not_train(tmp_path, command, inputs):
    shutil.copy(inputs / "dev.json", tmp_path / "other.json")
    argvs = [
        command(tmp_path / "host0" / "saved", devices=1, eval_file=f'["{tmp_path}/other.json"]'),
        command(tmp_path / "host1" / "saved", devices=1, seed=1),
    ]
    with two_hosts() as hosts, ended(ranks_there(hosts, argvs, tmp_path)) as processes:
        assert codes(processes) == [1, 2]
    for n in (0, 1):
        (line,) = errors(tmp_path / f"log{n}")
        assert "the first machine has other eval_file, seed, data: start the same command" in line


@pytest.mark.parametrize("failing", ["both", "second"])
def test_an_error_is_told_once_on_a_terminal(failing, tmp_path, command):
    settings = {"learning_rate": 1e30} if failing == "both" else {}
    options = {"at_step": 3, "then": "fail"} if failing == "second" else {}
    argv = command(tmp_path / "saved", train_batch_size=1, devices=2, **settings)
    with ended(ranks_here(argv, tmp_path / "log", **options)) as processes:
        assert set(codes(processes, within_seconds=20)) <= {1, 2}
    (line,) = errors(tmp_path / "log")
    reason = "the loss became" if failing == "both" else "has failed: made to fail"
    assert reason in line and "Traceback" not in (tmp_path / "log").read_text()


def send_to_the_second_first(pid, number):
    """As when the others hear of it before rank 0, which waits for them in a collective."""
    os.kill(psutil.Process(pid).children()[0].pid, number)
    time.sleep(0.5)
    os.kill(pid, number)


@pytest.mark.parametrize(
    ("number", "send"),
    [
        (signal.SIGINT, os.killpg),  # Ctrl-C on a terminal
        (signal.SIGINT, send_to_the_second_first),
        pytest.param(signal.SIGTERM, os.kill, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_of_two_processes_saves_what_it_learned(number, send, tmp_path, command):
    last, log = tmp_path / "saved" / "last", tmp_path / "log"
    settings = {"save_every_steps": 1, "max_epochs": 1000, "rank_timeout_seconds": 15}
    process = start(command(tmp_path / "saved", devices=2, **settings), log)
    try:
        wait_for(tmp_path / "saved" / "resume", process)
        shutil.rmtree(last, ignore_errors=True)
        send(process.pid, number)
        assert codes([process], within_seconds=40) == [1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert f"interrupted: what was learned is in {last}\n" in log.read_text()
    assert all(torch.isfinite(tensor).all() for tensor in tensors(last).values())
    assert "Traceback" not in log.read_text() and not errors(log)


# DeepSpeed.


@pytest.mark.parametrize("stage", ZERO)
def test_deepspeed_killed_and_gone_on_with_ends_as_one_process(stage, tmp_path, command, alone):
    pytest.importorskip("deepspeed")
    options = {"train_batch_size": 1, "devices": 2, "save_every_steps": 1, **ZERO[stage]}
    argv = command(tmp_path / "saved", **options)
    with ended(ranks_here(argv, tmp_path / "log", at_step=7, then="pause")) as processes:
        wait_for(tmp_path / "log.paused", processes[1])
        for process in processes:
            process.kill()
    assert (tmp_path / "saved" / "resume" / "state.ckpt").is_dir()
    with ended(ranks_here(argv, tmp_path / "log")) as processes:
        assert codes(processes) == [0, 0], (tmp_path / "log").read_text()
    assert "going on with the unfinished run" in (tmp_path / "log").read_text()
    assert_same(tmp_path / "saved", alone(2))


def test_deepspeed_without_a_shared_folder_is_refused_before_the_first_step(tmp_path, command):
    pytest.importorskip("deepspeed")
    argvs = [command(tmp_path / f"host{n}" / "saved", devices=1, **ZERO[2]) for n in (0, 1)]
    with two_hosts() as hosts, ended(ranks_there(hosts, argvs, tmp_path)) as processes:
        assert codes(processes) == [1, 2]
    for n in (0, 1):
        (line,) = errors(tmp_path / f"log{n}")
        assert "with DeepSpeed every machine writes a part of it: give a save_dir that" in line
