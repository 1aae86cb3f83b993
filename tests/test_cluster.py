"""Machines and devices from the environment; and a lost rank is named, by real processes.

`two_hosts()` makes two machines of this one, each with its own network and processes:

    with two_hosts() as hosts:
        processes = [
            subprocess.Popen([*host.command, sys.executable, "train.py"], env={**os.environ,
                "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "6667",
                "WORLD_SIZE": "2", "NODE_RANK": str(node_rank)})
            for node_rank, host in enumerate(hosts)
        ]
        processes[1].kill()  # a power cut: every process of that host is gone
        hosts[1].unplug()    # its cable is pulled: its processes live on
"""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from chatglm import cluster
from chatglm.cluster import (
    FINISHED,
    Cluster,
    Watchdog,
    address_towards,
    cluster_from_environment,
    set_network_interface,
)
from chatglm.errors import ToolkitError

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 1.5
ADVICE = "Go on with the same command."
STATED_SECONDS = TIMEOUT_SECONDS + 3 * TIMEOUT_SECONDS / 5 + 1.5  # 1.5: this machine is busy

MACHINE = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "6667", "WORLD_SIZE": "12", "NODE_RANK": "2"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "RANK": "5",
    "GROUP_RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu0", "MASTER_PORT": "29500",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "12345", "SLURM_JOB_NAME": "tune", "SLURM_NTASKS": "8", "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "6", "SLURM_NODEID": "1", "SLURM_LOCALID": "2",
}  # fmt: skip


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("devices", "available", "environ", "launcher", "shape"),
    [  # shape: machines, devices a machine, this machine, this process there
        (None, 0, {}, "lightning", (1, 1, 0, 0)),
        (None, 4, {}, "lightning", (1, 4, 0, 0)),
        (2, 4, {}, "lightning", (1, 2, 0, 0)),
        (3, 0, {}, "lightning", (1, 3, 0, 0)),
        (None, 4, MACHINE, "lightning", (3, 4, 2, 0)),
        (2, 4, {**MACHINE, "NODE_RANK": "5"}, "lightning", (6, 2, 5, 0)),
        (None, 0, {**MACHINE, "NODE_RANK": "11"}, "lightning", (12, 1, 11, 0)),
        (None, 4, {**MACHINE, "LOCAL_RANK": "3"}, "lightning", (3, 4, 2, 3)),
        (None, 4, TORCHRUN, "torchrun", (2, 4, 1, 1)),
        (4, 8, TORCHRUN, "torchrun", (2, 4, 1, 1)),
        (None, 4, {**SLURM, **TORCHRUN}, "torchrun", (2, 4, 1, 1)),
        (None, 4, SLURM, "slurm", (2, 4, 1, 2)),
        (None, 4, {**SLURM, "SLURM_JOB_NAME": "bash"}, "lightning", (1, 4, 0, 0)),
        (None, 4, {**SLURM, "SLURM_JOB_NAME": "interactive"}, "lightning", (1, 4, 0, 0)),
        (None, 4, without(SLURM, "SLURM_NTASKS"), "lightning", (1, 4, 0, 0)),
    ],
)
def test_the_environment_says_which_machines_and_devices(
    devices, available, environ, launcher, shape
):
    found = cluster_from_environment(devices, available=available, environ=environ)
    assert found == Cluster(launcher, *shape)
    assert (found.local_rank, found.world_size) == (shape[3], shape[0] * shape[1])


@pytest.mark.parametrize(
    ("devices", "available", "environ", "reason"),
    [
        (4, 2, {}, "4 devices a machine, but 2 GPUs"),
        (None, 8, MACHINE, "WORLD_SIZE=12: expected a multiple of the 8 devices"),
        (None, 4, {**MACHINE, "WORLD_SIZE": "0"}, "WORLD_SIZE=0: expected a multiple"),
        (None, 4, {"WORLD_SIZE": "8"}, "2 machines, but MASTER_ADDR, MASTER_PORT, NODE_RANK is"),
        (None, 4, without(MACHINE, "NODE_RANK"), "3 machines, but NODE_RANK is not set"),
        (None, 4, {**MACHINE, "NODE_RANK": "3"}, r"NODE_RANK\) is 3: allowed is 0 to 2"),
        (None, 4, {**MACHINE, "NODE_RANK": "one"}, "NODE_RANK is 'one': expected a whole number"),
        (None, 4, {**MACHINE, "NODE_RANK": "-1"}, "NODE_RANK is '-1'"),
        (None, 4, {**MACHINE, "WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        (None, 4, {**MACHINE, "LOCAL_RANK": "4"}, r"LOCAL_RANK\) is 4: allowed is 0 to 3"),
        (None, 4, {**MACHINE, "MASTER_PORT": "70000"}, "MASTER_PORT=70000: allowed is 1 to 65535"),
        (None, 4, {**MACHINE, "MASTER_PORT": "0"}, "MASTER_PORT=0"),
        (None, 4, {**MACHINE, "MASTER_PORT": "ssh"}, "MASTER_PORT is 'ssh'"),
        (2, 4, TORCHRUN, "devices 2: torchrun starts 4 processes a machine"),
        (None, 2, TORCHRUN, "4 devices a machine, but 2 GPUs"),
        (None, 4, {**TORCHRUN, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3: give torchrun"),
        (None, 4, {**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0: give torchrun"),
        (None, 4, without(TORCHRUN, "LOCAL_WORLD_SIZE"), "LOCAL_WORLD_SIZE is not set"),
        (None, 4, {**TORCHRUN, "RANK": "8"}, "RANK=8: allowed is 0 to 7"),
        (None, 4, {**TORCHRUN, "RANK": "x"}, "RANK is 'x'"),
        (None, 4, {**TORCHRUN, "GROUP_RANK": "2"}, "is 2: allowed is 0 to 1"),
        (None, 4, without(SLURM, "SLURM_NTASKS_PER_NODE"), "SLURM_NTASKS_PER_NODE is not set"),
        (None, 4, {**SLURM, "SLURM_NNODES": "1"}, "SLURM_NTASKS=8, but SLURM_NNODES=1"),
        (None, 4, without(SLURM, "SLURM_PROCID"), "start the script with srun"),
        (1, 4, SLURM, "devices 1: slurm starts 4"),
        (4, 4, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0",
                "SLURM_LOCALID": "0"}, "devices 4: slurm starts 1"),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused_in_one_line(devices, available, environ, reason):
    with pytest.raises(ToolkitError, match=reason) as caught:
        cluster_from_environment(devices, available=available, environ=environ)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("environ", [{}, {**MACHINE, "WORLD_SIZE": "9"}])
def test_the_processes_lightning_starts_see_the_same_cluster(environ, monkeypatch):
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies.launchers import subprocess_script

    here = cluster_from_environment(3, available=0, environ=environ)
    started = []
    monkeypatch.setattr(os, "environ", dict(environ))
    monkeypatch.setattr(
        subprocess_script.subprocess, "Popen", lambda *a, env, **k: started.append(env)
    )
    subprocess_script._SubprocessScriptLauncher(
        LightningEnvironment(), here.devices, here.num_nodes
    )._call_children_scripts()
    children = [cluster_from_environment(3, available=0, environ=env) for env in started]
    assert children == [here, here]
    assert [child.local_rank for child in children] == [1, 2]


@pytest.mark.parametrize(
    ("environ", "shape"),
    [
        ({"WORLD_SIZE": "2", "NODE_RANK": "{rank}"}, (2, 1)),
        (
            {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2",
             "RANK": "{rank}", "LOCAL_RANK": "{rank}", "GROUP_RANK": "0"}, (1, 2),
        ),
        (
            {"SLURM_JOB_ID": "12345", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
             "SLURM_NNODES": "2", "SLURM_PROCID": "{rank}", "SLURM_NODEID": "{rank}",
             "SLURM_LOCALID": "0"}, (2, 1),
        ),
    ],
    ids=["machines", "torchrun", "slurm"],
)  # fmt: skip
def test_lightning_trains_on_the_cluster_as_it_was_read(tmp_path, environ, shape):
    port, processes = free_port(), []
    for rank in range(2):
        values = {name: value.format(rank=rank) for name, value in environ.items()}
        values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(fork(train_a_step, values, rank, shape, str(tmp_path / str(rank))))
    with ended(processes):
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "0").read_text()


def train_a_step(environ, rank, shape, log):
    """One process of a run with Lightning's Trainer."""
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
    os.environ.update(environ)
    import lightning
    from lightning.pytorch.demos.boring_classes import BoringModel

    found = cluster_from_environment(None, available=0, environ=environ)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=found.devices, num_nodes=found.num_nodes, strategy="ddp",
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(BoringModel())
    assert (found.num_nodes, found.devices) == shape
    assert (trainer.node_rank, trainer.local_rank) == (found.node_rank, found.local_rank)
    assert (trainer.global_rank, trainer.world_size) == (rank, 2)


def fork(function, *arguments):
    """A running process that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_cluster", "lightning"])
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


@contextmanager
def ended(processes):
    """None of these outlives the block."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def watching(world_size, **states):
    """A watchdog of rank 0 that has read these states, {"r1": (host, silence, end)}."""
    watchdog = Watchdog(0, world_size, address="10.0.0.1", port=6667, advice=ADVICE)
    watchdog.states[0] = {"host": "10.0.0.1", "end": ""}
    for name, (host, silence, end) in states.items():
        watchdog.states[int(name[1:])] = {"host": host, "end": end}
        watchdog.silence[int(name[1:])] = silence
    return watchdog


def test_nobody_is_accused_who_answers_or_has_finished():
    watchdog = watching(3, r1=("10.0.0.2", 29.0, ""), r2=("10.0.0.3", 99.0, FINISHED))
    assert watchdog._verdict(died=[2]) is None


def test_the_ranks_of_a_lost_machine_are_named_together():
    watchdog = watching(4, r1=("10.0.0.2", 30.0, ""), r2=("10.0.0.2", 29.0, ""), r3=("b", 3.0, ""))
    assert watchdog._verdict(died=[]) == (
        f"ranks 1, 2 (host 10.0.0.2) have not answered for 30 s; stopped. {ADVICE}"
    )


def test_who_is_not_here_yet_has_the_longer_time_to_start():
    watchdog = watching(3, r1=("10.0.0.2", 0.0, ""))
    watchdog.silence[2] = 599.0
    assert watchdog._verdict(died=[]) is None
    watchdog.silence[2] = 600.0
    assert "rank 2 has not joined at 10.0.0.1:6667 within 600 s" in watchdog._verdict(died=[])


def test_what_another_rank_found_is_said_again():
    line = "rank 3 has died; stopped."
    assert watching(3, r1=("10.0.0.2", 99.0, line))._verdict(died=[]) == line


def run_rank(rank, world_size, address, port, log, options):
    """One process of a run: all-reduces until `steps` are done, or for ever."""
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
    os.environ["MASTER_ADDR"] = address
    set_network_interface(os.environ)
    if "machines" in options:
        cluster._machine = lambda: options["machines"][rank]
    watchdog = Watchdog(
        rank, world_size, address=address, port=port,
        timeout_seconds=TIMEOUT_SECONDS,
        start_timeout_seconds=options.get("start_timeout_seconds", 30.0), advice=ADVICE,
    )  # fmt: skip
    watchdog.start()
    try:
        meeting = f"tcp://{address}:{port}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
        for step in range(options.get("steps", 10**9)):
            if rank == options.get("slow_rank") and step == 0:
                time.sleep(1.3 * TIMEOUT_SECONDS)
            if rank == options.get("failing_rank") and step == 5:
                raise ZeroDivisionError("by zero")
            if rank in options.get("interrupted_ranks", []) and step == 6:
                raise KeyboardInterrupt
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total == world_size
            if step == 5:
                Path(f"{log}.running").touch()
            time.sleep(0.1)
        time.sleep(rank * options.get("seconds_apart", 0))
        watchdog.stop()
    except BaseException as error:
        watchdog.on_exception(error)
        if rank == 0 and isinstance(error, KeyboardInterrupt):
            time.sleep(1.3 * TIMEOUT_SECONDS)  # it saves
            Path(f"{log}.saved").touch()
        raise


@contextmanager
def ranks(folder, world_size, *, started=None, **options):
    """The running processes, by rank."""
    port = free_port()
    processes = {
        rank: fork(run_rank, rank, world_size, "127.0.0.1", port, str(folder / str(rank)), options)
        for rank in (range(world_size) if started is None else started)
    }
    with ended(list(processes.values())):
        yield processes


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_running(folder, *rank_numbers):
    deadline = time.monotonic() + 30
    while not all((folder / f"{rank}.running").exists() for rank in rank_numbers):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)


def errors(folder, rank):
    lines = (folder / str(rank)).read_text().splitlines()
    return [line for line in lines if line.startswith("error: ")]


def assert_end(folder, processes, line, *, within_seconds):
    """Each of these ends in time, with code 1 and with this one line."""
    deadline = time.monotonic() + within_seconds
    for rank, process in processes.items():
        process.join(max(deadline - time.monotonic(), 0.01))
        assert process.exitcode == 1, f"rank {rank} ended with {process.exitcode}"
        assert errors(folder, rank) == [line]


@pytest.mark.parametrize("victim", [2, 0])
def test_a_killed_process_is_named_by_the_others_at_once(tmp_path, victim):
    with ranks(tmp_path, 3) as processes:
        wait_until_running(tmp_path, 0, 1, 2)
        processes.pop(victim).kill()
        line = f"error: rank {victim} (host 127.0.0.1) has died; stopped. {ADVICE}"
        assert_end(tmp_path, processes, line, within_seconds=STATED_SECONDS)


def test_a_killed_process_is_named_at_once_on_the_other_machines_too(tmp_path):
    with ranks(tmp_path, 3, machines=["here", "here", "there"]) as processes:
        wait_until_running(tmp_path, 0, 1, 2)
        processes.pop(1).kill()
        line = f"error: rank 1 (host 127.0.0.1) has died; stopped. {ADVICE}"
        assert_end(tmp_path, processes, line, within_seconds=STATED_SECONDS)


@pytest.mark.parametrize("victim", [2, 0])
def test_a_silent_process_is_named_by_the_others_stuck_in_a_collective(tmp_path, victim):
    with ranks(tmp_path, 3) as processes:
        wait_until_running(tmp_path, 0, 1, 2)
        stopped = processes.pop(victim)
        os.kill(stopped.pid, signal.SIGSTOP)
        line = f"rank {victim} (host 127.0.0.1) has not answered for 1.5 s; stopped. {ADVICE}"
        assert_end(tmp_path, processes, f"error: {line}", within_seconds=STATED_SECONDS)
        stopped.kill()


def test_slow_steps_and_ends_at_different_times_raise_no_alarm(tmp_path):
    with ranks(tmp_path, 3, steps=8, slow_rank=1, seconds_apart=0.5) as processes:
        for rank, process in processes.items():
            process.join(30)
            assert (process.exitcode, errors(tmp_path, rank)) == (0, [])


def test_a_rank_that_fails_ends_the_others_and_keeps_its_traceback(tmp_path):
    with ranks(tmp_path, 3, failing_rank=1) as processes:
        failing = processes.pop(1)
        failing.join(30)
        line = "error: rank 1 (host 127.0.0.1) has failed (ZeroDivisionError: by zero); stopped."
        assert_end(tmp_path, processes, f"{line} {ADVICE}", within_seconds=STATED_SECONDS)
        assert failing.exitcode == 1 and errors(tmp_path, 1) == []
        assert "ZeroDivisionError" in (tmp_path / "1").read_text()


def test_after_an_interrupt_all_wait_for_what_rank_0_saves(tmp_path):
    with ranks(tmp_path, 3, interrupted_ranks=[0, 1, 2]) as processes:
        wait_until_running(tmp_path, 0, 1, 2)
        while all(process.is_alive() for process in processes.values()):
            time.sleep(0.01)
        assert (tmp_path / "0.saved").exists()
        for rank, process in processes.items():
            process.join(STATED_SECONDS)
            assert errors(tmp_path, rank) == []


def test_a_rank_that_alone_is_interrupted_ends_the_others(tmp_path):
    with ranks(tmp_path, 2, interrupted_ranks=[1]) as processes:
        wait_until_running(tmp_path, 0, 1)
        line = f"error: rank 1 (host 127.0.0.1) has not answered for 1.5 s; stopped. {ADVICE}"
        assert_end(tmp_path, {0: processes[0]}, line, within_seconds=STATED_SECONDS)
        processes[1].join(STATED_SECONDS)
        assert processes[1].exitcode == 1 and errors(tmp_path, 1) == []


@pytest.mark.parametrize("absent", [1, 0])
def test_a_rank_that_never_comes_is_named_after_the_time_to_start(tmp_path, absent):
    with ranks(tmp_path, 2, started=[1 - absent], start_timeout_seconds=1.0) as processes:
        processes[1 - absent].join(30)
        (line,) = errors(tmp_path, 1 - absent)
        assert f"rank {absent} has not joined at 127.0.0.1:" in line and "within 1 s" in line


def test_the_interface_a_user_has_named_stays_and_loopback_needs_none():
    environ = {"MASTER_ADDR": "127.0.0.1"}
    set_network_interface(environ)
    assert "GLOO_SOCKET_IFNAME" not in environ
    environ = {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "ib0"}
    set_network_interface(environ)
    assert environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert address_towards("no.such.host.invalid") == "127.0.0.1"


class Host(NamedTuple):
    """One of `two_hosts`."""

    name: str
    address: str

    @property
    def command(self):
        """Stands before a command to run it there; killed, it takes its processes along."""
        isolate = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return ["ip", "netns", "exec", self.name, *isolate]

    def unplug(self):
        """Pull the cable: nothing is sent or received any more, and nobody is told."""
        ip("-n", self.name, "link", "set", "veth0", "down")


@contextmanager
def two_hosts():
    """Two hosts that reach each other: network and process namespaces of this machine."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need root, ip and unshare")
    hosts = [Host(f"host{n}-{os.getpid()}", f"10.77.0.{n}") for n in (1, 2)]
    try:
        connect(*hosts)
        yield hosts
    except NotPermitted as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)


def connect(first, second):
    for host in (first, second):
        ip("netns", "add", host.name)
    pair = ("type", "veth", "peer", "name", "veth0", "netns", second.name)
    ip("link", "add", "veth0", "netns", first.name, *pair)
    for host in (first, second):
        ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "veth0")
        for device in ("lo", "veth0"):
            ip("-n", host.name, "link", "set", device, "up")


class NotPermitted(Exception):
    """What `ip` says when it may not."""


def ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise NotPermitted(done.stderr.strip())


@contextmanager
def ranks_on(hosts, folder, **options):
    """One rank a host."""
    processes = []
    try:
        for rank, host in enumerate(hosts):
            given = (rank, 2, hosts[0].address, 6667, str(folder / str(rank)), options)
            program = f"from tests.test_cluster import run_rank; run_rank{given!r}"
            command = [*host.command, sys.executable, "-c", program]
            processes.append(subprocess.Popen(command, cwd=ROOT))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize(("victim", "what"), [(1, "not answered for 1.5 s"), (0, "died")])
def test_a_host_that_loses_power_is_named_by_the_other(tmp_path, victim, what):
    with two_hosts() as hosts, ranks_on(hosts, tmp_path) as processes:
        wait_until_running(tmp_path, 0, 1)
        processes[victim].kill()
        assert processes[1 - victim].wait(STATED_SECONDS) == 1
        line = f"error: rank {victim} (host {hosts[victim].address}) has {what}; stopped. {ADVICE}"
        assert errors(tmp_path, 1 - victim) == [line]


def test_hosts_whose_cable_is_pulled_name_each_other(tmp_path):
    with two_hosts() as hosts, ranks_on(hosts, tmp_path) as processes:
        wait_until_running(tmp_path, 0, 1)
        hosts[1].unplug()
        assert [process.wait(STATED_SECONDS) for process in processes] == [1, 1]
        for rank, other in ((0, hosts[1]), (1, hosts[0])):
            name = f"rank {1 - rank} (host {other.address})"
            line = f"error: {name} has not answered for 1.5 s; stopped. {ADVICE}"
            assert errors(tmp_path, rank) == [line]
