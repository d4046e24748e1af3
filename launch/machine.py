"""What a machine has for training, found out without loading torch into this process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from data_pipeline.command_line import usable_cores
from launch.gpus import NoAnswer, ask_torch, has_driver, wants_cpu
from launch.interfaces import address_outside

TRIED = 1 << 26  # bytes that are written to see how fast that is
CGROUPS = Path("/sys/fs/cgroup")
COMPILERS = ("cc", "gcc", "clang")
# The memory of a GPU that nobody uses is free but for what looking at it takes itself.
PROGRAM = """
import json, torch
gpus = []
for number in range(torch.cuda.device_count()):
    properties, (free, total) = torch.cuda.get_device_properties(number), torch.cuda.mem_get_info(number)
    gpus.append([properties.name, total, free, properties.major >= 8 or torch.version.hip is not None])
print(json.dumps([torch.__version__, torch.version.cuda or torch.version.hip or "", gpus]))
"""


class Gpu(NamedTuple):
    """A GPU that this process may use."""

    name: str
    total: int  # bytes
    free: int  # bytes
    bfloat: bool
    """whether it computes in bf16"""


class Torch(NamedTuple):
    """What torch says of itself and of the GPUs that it sees."""

    version: str = ""
    built_for: str = ""
    """version of CUDA or ROCm; empty: it knows CPUs only"""
    gpus: tuple[Gpu, ...] = ()
    trouble: str = ""
    """why it says nothing, in a line"""


class Place(NamedTuple):
    """Where runs are written."""

    folder: Path
    free: int = 0
    """bytes"""
    rate: float = 0.0
    """bytes a second, through to the disk"""
    trouble: str = ""
    """why no run can be there"""


class Machine(NamedTuple):
    """All that is looked at."""

    cores: int
    memory: int
    """bytes that are free, of those that this process may have"""
    driver: bool
    """whether there is a GPU's driver, and GPUs are wanted"""
    torch: Torch
    files: int
    """files and connections that a process may hold open"""
    address: str | None
    """towards other machines"""
    compiler: str | None
    place: Place


def look_around(runs: Path) -> Machine:
    """Look at this machine, and at the folder `runs`, or the one in which it would be made."""
    return Machine(
        cores=usable_cores(),
        memory=free_memory(),
        driver=has_driver(os.environ) and not wants_cpu(),
        torch=_ask_torch(),
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        address=address_outside(),
        compiler=os.environ.get("CC") or next(filter(None, map(shutil.which, COMPILERS)), None),
        place=try_place(runs),
    )


def _ask_torch() -> Torch:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""} if wants_cpu() else None
    try:
        version, built_for, gpus = ask_torch(PROGRAM, env)
    except NoAnswer as why:
        return Torch(trouble=str(why))
    return Torch(version, built_for, tuple(Gpu(*one) for one in gpus))


def free_memory() -> int:
    """Bytes of memory that are free, here and in the control groups (version 2) that this process is in."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").rpartition("0::/")[2].strip()
        for group in (CGROUPS / own, *(CGROUPS / own).parents):
            with contextlib.suppress(OSError, ValueError):
                most = int((group / "memory.max").read_text("ascii"))
                free = min(free, max(0, most - int((group / "memory.current").read_text("ascii"))))
    return free


def try_place(folder: Path) -> Place:
    """Write there, lock and rename as a run does; nothing is left."""
    there = folder.absolute()
    try:
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryDirectory(prefix=".lockstep-doctor-", dir=there) as made:
            part = Path(made) / "part"
            with part.open("wb") as file:
                rate = _written(file.fileno())
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.rename(part.with_name("whole"))
        return Place(there, shutil.disk_usage(there).free, rate)
    except OSError as error:
        return Place(there, trouble=error.strerror or str(error))


def _written(file: int) -> float:
    """Bytes a second of writing TRIED of them."""
    block, began = os.urandom(1 << 20), time.monotonic()
    for _ in range(TRIED // len(block)):
        os.write(file, block)
    os.fsync(file)
    return TRIED / (time.monotonic() - began)
