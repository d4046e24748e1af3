"""What a process checks about the launcher that started it, and how its life is tied to the launcher's."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

from training.config import UserError

PR_SET_PDEATHSIG = 1  # prctl(2)
GRACE = 4.0  # seconds that a process goes on without its launcher, to save what it has
POLL = 0.5  # seconds


def tie_to_launcher() -> None:
    """End when the launcher ends: torchrun and accelerate start their processes in sessions of their own.

    The kernel sends SIGTERM, on which training stops and saves; whoever is not gone after the grace, because
    it waits for a process that is, leaves at once. Only under a launcher: what a shell started must outlive
    that shell (nohup).
    """
    if sys.platform == "linux" and {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        threading.Thread(
            target=_leave_after, args=(os.getppid(),), name="launcher-watch", daemon=True
        ).start()


def _leave_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


def check_launch() -> None:
    """Refuse a start in which fewer processes came up than were asked for; USAGE."""
    env = os.environ
    # accelerate sets MASTER_ADDR for several processes even where it then starts one.
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in env and b"MASTER_ADDR=" not in _parent_environment()
    if "MASTER_ADDR" in env and "WORLD_SIZE" not in env and by_accelerate:
        raise UserError(
            "accelerate was asked for several processes and started one: on CPUs it ignores --num_processes",
            mend="torchrun --nproc_per_node N run.py, or accelerate launch --multi_gpu --num_processes N",
            code="USAGE",
        )
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if name in env and not (env[name].isascii() and env[name].isdigit()):
            raise UserError(
                f"{name}={env[name]!r} is no number", mend="start with accelerate or torchrun", code="USAGE"
            )
    world = int(env.get("WORLD_SIZE", "1"))
    missing = [name for name in ("RANK", "MASTER_ADDR") if name not in env]
    if world > 1 and missing:
        raise UserError(
            f"{world} processes were asked for (WORLD_SIZE), without {' and '.join(missing)}",
            mend=f"start with torchrun --nproc_per_node {world} run.py, which sets them",
            code="USAGE",
        )
    if int(env.get("RANK", "0")) >= world:
        raise UserError(
            f"RANK={env['RANK']} of WORLD_SIZE={world}: ranks count from 0",
            mend="start with accelerate or torchrun, which number the processes",
            code="USAGE",
        )


def _parent_environment() -> bytes:
    """The variables that the launcher itself was started with; empty where that cannot be seen."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{os.getppid()}/environ").read_bytes()
    return b""
