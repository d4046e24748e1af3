"""What of a machine would waste a training run; pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.command_line import counted
from data_pipeline.findings import HURTS, NOTE, Finding, Kind
from launch.machine import Machine
from launch.open_files import LEAST
from training.config import Config

GIB = 1 << 30
PROCESS_MEMORY = 1.5  # GiB of a process with its readers, at the least
GPU_CORES = 4  # of a process with a GPU: fewer seldom decode as fast as it learns
TAKEN = 0.1  # of a GPU's memory, by others
ROOM = 1 * GIB  # bytes for checkpoints, at the least
SLOW = 50e6  # bytes a second: a checkpoint of a gigabyte takes 20 s

KINDS = {
    "torch": Kind(HURTS, "python -c 'import torch' says more; make the environment again"),
    "no-gpu": Kind(HURTS, "nvidia-smi, or rocm-smi, says whether the driver sees them; to use none: --cpu"),
    "gpu-taken": Kind(HURTS, "nvidia-smi lists who uses it; CUDA_VISIBLE_DEVICES leaves it out"),
    "gpus-differ": Kind(NOTE, "all wait for the slowest: CUDA_VISIBLE_DEVICES chooses those that are alike"),
    "few-cores": Kind(HURTS, "start fewer processes, or ask for more cores: --cpus-per-gpu, --cpus-per-task"),
    "cores-of-readers": Kind(NOTE, "fewer readers: --data.workers; or ask for more cores"),
    "little-memory": Kind(HURTS, "end what else runs, start fewer processes, or ask for more memory"),
    "open-files": Kind(HURTS, "raise the limit: ulimit -n 65536"),
    "run-folder": Kind(HURTS, "make it writable and mend its disk, or give another one: --run-dir"),
    "little-room": Kind(HURTS, "make room, or write elsewhere: --run-dir"),
    "slow-disk": Kind(NOTE, "training does not wait for it, but a stop does; a faster disk: --run-dir"),
    "no-network": Kind(NOTE, "nothing to do on one machine; for several bring an interface up: ip link"),
    "no-compiler": Kind(HURTS, "install gcc, or --model.no-compile"),
    "precision": Kind(HURTS, "another --train.precision"),
    "small-batch": Kind(HURTS, "a larger --train.global-batch, or fewer processes"),
}


@dataclass(frozen=True)
class MachineFinding(Finding):
    """One of them."""

    @property
    def kind(self) -> Kind:
        """Its severity, and how things of its kind are mended."""
        return KINDS[self.code]


def judge(machine: Machine, config: Config | None, processes: int) -> list[MachineFinding]:
    """What would hurt `processes` on this machine, and with `config` what would hurt that run."""
    found = [*_of_gpus(machine), *_of_cores(machine, config, processes), *_of_place(machine)]
    return found + ([] if config is None else list(_of_run(machine, config, processes)))


def _of_gpus(machine: Machine) -> Iterator[MachineFinding]:
    torch = machine.torch
    if torch.trouble:
        yield MachineFinding("torch", f"torch cannot be loaded: {torch.trouble}")
    elif machine.driver and not torch.built_for:
        mend = "install a torch that is built for CUDA or ROCm; to use none: --cpu"
        yield MachineFinding("no-gpu", f"torch {torch.version} is built for CPUs only", mending=mend)
    elif machine.driver and not torch.gpus:
        yield MachineFinding(
            "no-gpu", f"torch {torch.version} ({torch.built_for}) sees no GPU, though there is a driver"
        )
    for number, gpu in enumerate(torch.gpus):
        if gpu.free < (1 - TAKEN) * gpu.total:
            taken = f"{(gpu.total - gpu.free) / GIB:.1f} of {gpu.total / GIB:.1f} GiB are taken"
            yield MachineFinding("gpu-taken", f"GPU {number} ({gpu.name}): {taken}")
    if len(kinds := {(gpu.name, gpu.total) for gpu in torch.gpus}) > 1:
        yield MachineFinding("gpus-differ", ", ".join(sorted(name for name, _ in kinds)))


def _of_cores(machine: Machine, config: Config | None, processes: int) -> Iterator[MachineFinding]:
    cores, of = counted(machine.cores, "core"), counted(processes, "process", "processes")
    if machine.cores < processes:
        yield MachineFinding("few-cores", f"{cores} for {of}")
    elif machine.torch.gpus and machine.cores < GPU_CORES * processes:
        yield MachineFinding("cores-of-readers", f"{cores} for {of} and their readers, on GPUs")
    elif config is not None and processes * config.data.workers > 2 * machine.cores:
        yield MachineFinding("cores-of-readers", f"{cores} for {of} with {config.data.workers} readers each")
    if machine.memory < PROCESS_MEMORY * GIB * processes:
        yield MachineFinding("little-memory", f"{machine.memory / GIB:.1f} GiB are free for {of}")
    if 0 <= machine.files < LEAST:
        yield MachineFinding("open-files", f"{machine.files} may be open at once, {LEAST} are needed")
    if machine.address is None:
        yield MachineFinding("no-network", "other machines cannot be reached from here")


def _of_place(machine: Machine) -> Iterator[MachineFinding]:
    place = machine.place
    if place.trouble:
        yield MachineFinding("run-folder", f"'{place.folder}': {place.trouble}")
        return
    if place.free < ROOM:
        yield MachineFinding("little-room", f"'{place.folder}': {place.free / GIB:.2f} GiB are free")
    if place.rate < SLOW:
        yield MachineFinding("slow-disk", f"'{place.folder}' takes {place.rate / 1e6:.0f} MB a second")


def _of_run(machine: Machine, config: Config, processes: int) -> Iterator[MachineFinding]:
    if config.model.compile and machine.compiler is None:
        yield MachineFinding("no-compiler", "model.compile needs a C compiler, and there is none")
    precision, gpus = config.train.precision, machine.torch.gpus
    if precision == "fp16" and not gpus:
        yield MachineFinding("precision", "train.precision fp16 needs a GPU")
    if precision == "bf16" and not all(gpu.bfloat for gpu in gpus):
        name = next(gpu.name for gpu in gpus if not gpu.bfloat)
        yield MachineFinding("precision", f"train.precision bf16: {name} does not compute in it")
    if (batch := config.train.global_batch) < processes:
        yield MachineFinding("small-batch", f"{counted(batch, 'sample')} a step for {processes} processes")
