"""Processes that tests start: forked with everything imported, and on two hosts.

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

import ctypes
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
from contextlib import contextmanager
from typing import NamedTuple

import pytest

CLONE_NEWNET, CLONE_NEWPID, PR_SET_PDEATHSIG = 0x40000000, 0x20000000, 1  # linux/{sched,prctl}.h


def fork(function, *arguments, preload=("tests.test_watchdog", "lightning")):
    """A running process that has imported everything already, if it is the first of the tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


@contextmanager
def ended(processes):
    """None of these outlives the block."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Host(NamedTuple):
    """One of `two_hosts`."""

    name: str
    address: str

    @property
    def command(self):
        """Stands before a command to run it there; killed, it takes its processes along."""
        isolate = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return ["ip", "netns", "exec", self.name, *isolate]

    def enter(self):
        """Go there with this process; killed, it takes what runs there along as well."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.name}") as space:
            assert libc.setns(space.fileno(), CLONE_NEWNET) == 0
        assert libc.unshare(CLONE_NEWPID) == 0
        process = os.fork()
        if process:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

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
