"""A lost rank is named, by real processes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from chatglm import watchdog as watchdog_module
from chatglm.cluster import set_network_interface
from chatglm.watchdog import FINISHED, Watchdog

from .processes import ended, fork, free_port, two_hosts

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 1.5
ADVICE = "Go on with the same command."
STATED_SECONDS = TIMEOUT_SECONDS + 3 * TIMEOUT_SECONDS / 5 + 1.5  # 1.5: this machine is busy


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
        watchdog_module._machine = lambda: options["machines"][rank]
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


def wait_until_running(folder, *rank_numbers):
    deadline = time.monotonic() + 30
    while not all((folder / f"{rank}.running").exists() for rank in rank_numbers):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)


def errors(folder, rank):
    lines = (folder / str(rank)).read_text().splitlines()
    return [line for line in lines if line.startswith("error: ")]


def assert_end(folder, processes, line, *, within_seconds, speakers=()):
    """Each of these ends in time, with code 1; the lowest, or all speakers, with this one line."""
    deadline = time.monotonic() + within_seconds
    for rank, process in processes.items():
        process.join(max(deadline - time.monotonic(), 0.01))
        assert process.exitcode == 1, f"rank {rank} ended with {process.exitcode}"
        assert errors(folder, rank) == [line] * (rank in (speakers or [min(processes)]))


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
        assert_end(tmp_path, processes, line, within_seconds=STATED_SECONDS, speakers=(0, 2))


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


def test_a_rank_0_that_alone_is_interrupted_has_time_to_save(tmp_path):
    with ranks(tmp_path, 2, interrupted_ranks=[0]) as processes:
        wait_until_running(tmp_path, 0, 1)
        line = f"error: rank 0 (host 127.0.0.1) has been interrupted; stopped. {ADVICE}"
        assert_end(tmp_path, {1: processes[1]}, line, within_seconds=STATED_SECONDS)
        assert (tmp_path / "0.saved").exists()


def test_a_rank_that_alone_is_interrupted_ends_the_others(tmp_path):
    with ranks(tmp_path, 2, interrupted_ranks=[1]) as processes:
        wait_until_running(tmp_path, 0, 1)
        line = f"error: rank 1 (host 127.0.0.1) has been interrupted; stopped. {ADVICE}"
        assert_end(tmp_path, {0: processes[0]}, line, within_seconds=STATED_SECONDS)
        processes[1].join(STATED_SECONDS)
        assert processes[1].exitcode == 1 and errors(tmp_path, 1) == []


def test_an_interrupt_on_one_machine_ends_the_others_soon(tmp_path):
    with ranks(tmp_path, 2, interrupted_ranks=[1], machines=["here", "there"]) as processes:
        wait_until_running(tmp_path, 0, 1)
        line = f"error: rank 1 (host 127.0.0.1) has been interrupted; stopped. {ADVICE}"
        assert_end(tmp_path, {0: processes[0]}, line, within_seconds=STATED_SECONDS)


@pytest.mark.parametrize("absent", [1, 0])
def test_a_rank_that_never_comes_is_named_after_the_time_to_start(tmp_path, absent):
    with ranks(tmp_path, 2, started=[1 - absent], start_timeout_seconds=1.0) as processes:
        processes[1 - absent].join(30)
        (line,) = errors(tmp_path, 1 - absent)
        assert f"rank {absent} has not joined at 127.0.0.1:" in line and "within 1 s" in line


@contextmanager
def ranks_on(hosts, folder, **options):
    """One rank a host."""
    processes = []
    try:
        for rank, host in enumerate(hosts):
            given = (rank, 2, hosts[0].address, 6667, str(folder / str(rank)), options)
            program = f"from tests.test_watchdog import run_rank; run_rank{given!r}"
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
