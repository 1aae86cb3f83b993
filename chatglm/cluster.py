"""Which machines and devices a run uses, and the network between them.

A run is `num_nodes` machines of `devices` processes each. Who starts the processes says so in the
environment: torchrun, SLURM's srun, or Lightning itself, which starts one process a device on its
machine when `python train.py` is run there once. `cluster_from_environment` reads it the way
Lightning does (plugins/environments), but refuses what Lightning would wait on for ever.
"""

import socket
import struct
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Literal

from .errors import ToolkitError

SIOCGIFADDR = 0x8915  # linux/sockios.h: the address of an interface


@dataclass(frozen=True)
class Cluster:
    """The machines and devices of a run, as seen by every process of one machine."""

    launcher: Literal["lightning", "torchrun", "slurm"]
    """Who starts the processes of a machine."""
    num_nodes: int
    """Machines."""
    devices: int
    """GPUs (or CPU processes) a machine."""
    node_rank: int
    """This machine's number, from 0."""
    local_rank: int = field(compare=False)
    """This process's number on its machine, from 0."""

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.num_nodes * self.devices

    @property
    def is_first(self) -> bool:
        """True for the process that speaks and saves for all."""
        return self.node_rank == self.local_rank == 0


def cluster_from_environment(
    devices: int | None, *, available: int, environ: Mapping[str, str]
) -> Cluster:
    """The machines and devices that `environ` describes.

    devices: GPUs (or CPU processes) a machine; None: what the launcher says, else all GPUs.
    available: GPUs visible here; 0 stands for the CPU, which takes any number of processes.

    Raises:
        ToolkitError: for variables that are no numbers, are missing, or contradict each other.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        cluster = _from_torchrun(environ)
    elif "SLURM_NTASKS" in environ and environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        cluster = _from_slurm(environ)
    else:
        cluster = _from_lightning(max(available, 1) if devices is None else devices, environ)
    if devices not in (None, cluster.devices):
        raise ToolkitError(
            f"devices {devices}: {cluster.launcher} starts {cluster.devices} processes a machine;"
            " give both the same number, or leave devices null"
        )
    if 0 < available < cluster.devices:
        raise ToolkitError(
            f"{cluster.devices} devices a machine, but {available} GPUs are visible to this"
            " process: lower devices, or look at CUDA_VISIBLE_DEVICES"
        )
    for name, value, count in (
        ("number of this machine (NODE_RANK)", cluster.node_rank, cluster.num_nodes),
        ("number of this process (LOCAL_RANK)", cluster.local_rank, cluster.devices),
    ):
        if value >= count:
            raise ToolkitError(
                f"the {name} is {value}: allowed is 0 to {count - 1}, with WORLD_SIZE"
                f" {cluster.world_size} = {cluster.num_nodes} machines x {cluster.devices} devices"
            )
    if "MASTER_PORT" in environ and not 0 < _number(environ, "MASTER_PORT") < 2**16:
        raise ToolkitError(f"MASTER_PORT={environ['MASTER_PORT']}: allowed is 1 to {2**16 - 1}")
    return cluster


def _from_lightning(devices: int, environ: Mapping[str, str]) -> Cluster:
    world_size = _number(environ, "WORLD_SIZE", devices)
    if world_size == 0 or world_size % devices:
        raise ToolkitError(
            f"WORLD_SIZE={world_size}: expected a multiple of the {devices} devices of a machine"
            " (it counts processes, machines x devices)"
        )
    missing = [n for n in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if n not in environ]
    if world_size > devices and missing:
        raise ToolkitError(
            f"WORLD_SIZE={world_size} with {devices} devices a machine is"
            f" {world_size // devices} machines, but {', '.join(missing)} is not set; run"
            f" MASTER_ADDR=(machine 0) MASTER_PORT=(free there) WORLD_SIZE={world_size}"
            f" NODE_RANK=(0 to {world_size // devices - 1}) python train.py on each"
        )
    return Cluster(
        "lightning",
        num_nodes=world_size // devices,
        devices=devices,
        node_rank=_number(environ, "NODE_RANK", 0),
        local_rank=_number(environ, "LOCAL_RANK", 0),
    )


def _from_torchrun(environ: Mapping[str, str]) -> Cluster:
    devices, world_size = _number(environ, "LOCAL_WORLD_SIZE"), _number(environ, "WORLD_SIZE")
    if devices == 0 or world_size == 0 or world_size % devices:
        raise ToolkitError(
            f"WORLD_SIZE={world_size} with LOCAL_WORLD_SIZE={devices}: give torchrun the same"
            " --nproc_per_node on every machine"
        )
    if _number(environ, "RANK") >= world_size:
        raise ToolkitError(f"RANK={environ['RANK']}: allowed is 0 to {world_size - 1}")
    return Cluster(
        "torchrun",
        num_nodes=world_size // devices,
        devices=devices,
        node_rank=_number(environ, "GROUP_RANK", 0),
        local_rank=_number(environ, "LOCAL_RANK"),
    )


def _from_slurm(environ: Mapping[str, str]) -> Cluster:
    tasks = _number(environ, "SLURM_NTASKS")
    # Lightning asks for --ntasks-per-node as soon as there are two tasks.
    devices = _number(environ, "SLURM_NTASKS_PER_NODE", 1 if tasks == 1 else None)
    num_nodes = _number(environ, "SLURM_NNODES", 1)
    if devices * num_nodes != tasks or tasks == 0:
        raise ToolkitError(
            f"SLURM_NTASKS={tasks}, but SLURM_NNODES={num_nodes} x SLURM_NTASKS_PER_NODE={devices}:"
            " give sbatch --nodes and --ntasks-per-node (one task a GPU), not --ntasks"
        )
    if "SLURM_PROCID" not in environ:
        raise ToolkitError("SLURM_PROCID is not set: start the script with srun python train.py")
    return Cluster(
        "slurm",
        num_nodes=num_nodes,
        devices=devices,
        node_rank=_number(environ, "SLURM_NODEID"),
        local_rank=_number(environ, "SLURM_LOCALID"),
    )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in environ and default is not None:
        return default
    text = environ.get(name)
    if text is None or not (text.isascii() and text.isdigit()):
        given = "is not set" if text is None else f"is {text!r}"
        raise ToolkitError(f"the environment variable {name} {given}: expected a whole number")
    return int(text)


def set_network_interface(environ: MutableMapping[str, str]) -> None:
    """Name the interface that reaches MASTER_ADDR to gloo, unless the user has named one.

    gloo takes the address that this machine's name stands for in /etc/hosts, often 127.0.1.1 and
    of no use to other machines. NCCL looks at the interfaces themselves, and is left alone.
    """
    import fcntl  # not on Windows, where one process can train all the same

    address = address_towards(environ.get("MASTER_ADDR", "127.0.0.1"))
    if "GLOO_SOCKET_IFNAME" in environ or address.startswith("127."):
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # this interface has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                environ["GLOO_SOCKET_IFNAME"] = name


def address_towards(host: str) -> str:
    """The own address from which `host` is reached; 127.0.0.1 when it cannot be. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]
