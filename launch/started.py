"""What a process checks about how it was started, before anything heavy is loaded."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.gpus import uses_cpu
from launch.topology import by_srun
from training.config import UserError

NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # by one of several processes
_NUMBER = re.compile(r"[0-9]{1,9}")


def check_launch(expected: int | None = None, words: Sequence[str] = ()) -> None:
    """Refuse a start in which fewer processes came up than were asked for; USAGE.

    `words`: the arguments of training/run.py, for the command to use instead.
    """
    env = os.environ
    _check_numbers(env)
    world = int(env.get("WORLD_SIZE", "1"))
    _check_place(env, world)
    if "WORLD_SIZE" not in env:
        _check_accelerate(env, words)
    if expected is not None and world != expected:
        raise UserError(
            f"--expect-processes {expected}: {world} came up",
            mend=_ours(expected, words, *(["--cpu"] if uses_cpu(env) else [])),
            code="USAGE",
        )
    if expected is None and "WORLD_SIZE" not in env and not by_srun(env):
        _check_batch_script(env, words)


def _check_numbers(env: Mapping[str, str]) -> None:
    for name in NUMBERS:
        if name in env and not _NUMBER.fullmatch(env[name]):
            raise _misplaced(f"{name}={env[name][:80]!r} is no number")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        if name in env and int(env[name]) < 1:
            raise _misplaced(f"{name}={env[name]}: there is at least this process")


def _check_place(env: Mapping[str, str], world: int) -> None:
    """Whether this process can be one of so many."""
    if int(env.get("RANK", "0")) >= world:
        raise _misplaced(f"RANK={env['RANK']} of WORLD_SIZE={world}: ranks count from 0")
    local = int(env.get("LOCAL_WORLD_SIZE", str(world)))
    if local > world:
        raise _misplaced(f"LOCAL_WORLD_SIZE={local}, more than the WORLD_SIZE={world} of all machines")
    if int(env.get("LOCAL_RANK", "0")) >= local:
        raise _misplaced(f"LOCAL_RANK={env['LOCAL_RANK']} of {local} processes here: ranks count from 0")
    missing = [name for name in NEEDED if not env.get(name)]
    if world > 1 and missing:
        raise _misplaced(
            f"{world} processes were asked for (WORLD_SIZE), without {_listed(missing)}",
            mend=f"lockstep launch --processes-per-node {world}, torchrun and srun set all of them",
        )
    port = env.get("MASTER_PORT", "0")
    if world > 1 and not (_NUMBER.fullmatch(port) and int(port) < 1 << 16):
        raise _misplaced(f"MASTER_PORT={port[:80]!r} is no port")
    threads = env.get("OMP_NUM_THREADS", "1")
    if world > 1 and not _NUMBER.fullmatch(threads):
        raise UserError(f"OMP_NUM_THREADS={threads[:80]!r} is no number", mend="leave it out", code="USAGE")


def _check_accelerate(env: Mapping[str, str], words: Sequence[str]) -> None:
    """Whether accelerate was asked for several processes and has started this one only.

    It sets MASTER_ADDR for several also where it then starts one.
    """
    if "ACCELERATE_MIXED_PRECISION" not in env:
        return
    said = _processes_said(_parent("cmdline"))
    invented = "MASTER_ADDR" in env and b"MASTER_ADDR=" not in _parent("environ")
    if (said or 1) > 1 or invented:
        raise UserError(
            "accelerate was asked for several processes and started one: on CPUs it ignores --num_processes",
            mend=_ours(said, words, "--cpu"),
            code="USAGE",
        )


def _check_batch_script(env: Mapping[str, str], words: Sequence[str]) -> None:
    """Whether this is the only process of a SLURM job that is to have several."""
    for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES"):
        count = env.get(name, "1")
        if "SLURM_JOB_ID" in env and _NUMBER.fullmatch(count) and int(count) > 1:
            raise UserError(
                f"one process in a SLURM job with {name}={count}: srun is what starts several",
                mend=f"{shlex.join(['srun', 'python', 'training/run.py', *words])}"
                "; if one is meant: --expect-processes 1",
                code="USAGE",
            )


def _ours(processes: int | None, words: Sequence[str], *options: str) -> str:
    """The command that starts so many processes of this run."""
    count = str(processes) if processes else "N"
    return shlex.join(["lockstep", "launch", *options, "--processes-per-node", count, "--", *words])


def _processes_said(line: bytes) -> int | None:
    """What --num_processes says on the command line of the process that started this one."""
    found = re.findall(rb"\x00--num[_-]processes[=\x00]([0-9]{1,9})(?=\x00)", line)
    return int(found[-1]) if found else None


def _parent(file: str) -> bytes:
    """The command line or the variables that the launcher itself was started with, where they can be seen."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{os.getppid()}/{file}").read_bytes()
    return b""


def _misplaced(what: str, mend: str = "") -> UserError:
    mend = mend or "start with lockstep launch, accelerate, torchrun or srun, which number the processes"
    return UserError(what, mend=mend, code="USAGE")


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
