"""Machines and devices from the environment."""

import os

import pytest

from chatglm.cluster import (
    Cluster,
    address_towards,
    cluster_from_environment,
    set_network_interface,
)
from chatglm.errors import ToolkitError

from .processes import ended, fork, free_port

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


def test_the_interface_a_user_has_named_stays_and_loopback_needs_none():
    environ = {"MASTER_ADDR": "127.0.0.1"}
    set_network_interface(environ)
    assert "GLOO_SOCKET_IFNAME" not in environ
    environ = {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "ib0"}
    set_network_interface(environ)
    assert environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert address_towards("no.such.host.invalid") == "127.0.0.1"
