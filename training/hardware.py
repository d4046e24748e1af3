"""What of a machine a process uses: its share of the cores, and a GPU of its own."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from data_pipeline.command_line import usable_cores
from data_pipeline.fault import UserError

# What decides how processes reach each other; said where somebody has set it.
NETWORK_VARIABLES = ("NCCL_", "GLOO_", "TORCH_NCCL_")


def local_processes() -> int:
    """Processes of this job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def process_cores() -> int:
    """Cores that this process may count on: what SLURM gave it, else its part of what all here share."""
    given = int(os.environ.get("LOCKSTEP_CORES", "0"))
    return given or max(1, usable_cores() // local_processes())


def check_visible(visible: int, processes: int) -> None:
    """USAGE where the processes of this machine cannot have a GPU each.

    One that is visible is this process's own: srun --gpus-per-task shows each process another one.
    """
    if 1 < visible < processes:
        raise UserError(
            f"{processes} processes on this machine, which has {visible} GPUs",
            mend="start one process per GPU, or set ACCELERATE_USE_CPU=true to train on the CPU",
            code="USAGE",
        )


class Gpu(NamedTuple):
    """The GPU of one process."""

    host: str
    name: str
    identity: str  # of this one among all there are; empty: not known


def own_gpu(device: torch.device) -> Gpu:
    """The GPU that this process uses."""
    properties = torch.cuda.get_device_properties(device)
    # Instances of one GPU are GPUs of their own, known by the name under which they were made visible.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    index = device.index or 0
    instance = visible[index] if index < len(visible) and visible[index].startswith("MIG-") else ""
    identity = instance or str(getattr(properties, "uuid", ""))
    return Gpu(socket.gethostname(), f"{properties.name} ({device})", identity)


def check_one_each(everyone: Sequence[Gpu]) -> None:
    """USAGE where two processes use one GPU; `everyone` is in the order of their numbers."""
    first: dict[str, int] = {}
    for rank, gpu in enumerate(everyone):
        if not gpu.identity:
            continue
        other = first.setdefault(gpu.identity, rank)
        if other != rank:
            raise UserError(
                f"processes {other} and {rank} on {gpu.host} use the same GPU: {gpu.name}, {gpu.identity}",
                mend="start one process per GPU, or set ACCELERATE_USE_CPU=true to train on the CPU",
                code="USAGE",
            )


def check_gpus(device: torch.device) -> None:
    """The same for the processes that have joined, all of which come here.

    They meet on the CPU: NCCL refuses two of them on one GPU in words of its own, or waits for ever.
    """
    group = dist.new_group(backend="gloo")
    everyone: list[Gpu | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own_gpu(device), group=group)
    dist.destroy_process_group(group)
    check_one_each([gpu for gpu in everyone if gpu is not None])


def hardware_lines(device: torch.device, env: Mapping[str, str]) -> list[str]:
    """What this process computes on, and how it reaches the others, a line each."""
    several = int(env.get("WORLD_SIZE", "1")) > 1
    nodes = several and env.get("LOCAL_WORLD_SIZE") != env["WORLD_SIZE"]
    cores, threads = process_cores(), torch.get_num_threads()
    words = [
        f"{cores} core{'s' * (cores > 1)}",
        f"{threads} thread{'s' * (threads > 1)}" + " a process" * several,
    ]
    if nodes:
        name = "NCCL_SOCKET_IFNAME" if device.type == "cuda" else "GLOO_SOCKET_IFNAME"
        interface = env.get(name, "any interface")
        words.append(f"{dist.get_backend()} on {interface}")
    if device.type != "cuda":
        return [", ".join(words)]
    properties = torch.cuda.get_device_properties(device)
    visible = env.get("CUDA_VISIBLE_DEVICES")
    words[:0] = [properties.name, f"{properties.total_memory / 2**30:.0f} GiB"]
    words += [f"CUDA_VISIBLE_DEVICES={visible}"] if visible is not None else []
    nccl: Any = torch.cuda.nccl
    words += [f"NCCL {'.'.join(map(str, nccl.version()))}"] if several else []
    named = sorted(name for name in env if name.startswith(NETWORK_VARIABLES))
    lines = [", ".join(words)]
    if named and several:
        lines.append(" ".join(f"{name}={shlex.quote(ascii(env[name])[1:-1])}" for name in named))
    return lines
