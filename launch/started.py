"""What a process checks about how it was started, before anything heavy is loaded."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from training.config import UserError


def check_launch(expected: int | None = None) -> None:
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
    if expected is not None and world != expected:
        raise UserError(
            f"--expect-processes {expected}: {world} came up",
            mend=f"lockstep launch --processes-per-node {expected} -- ..., or torchrun --nproc_per_node",
            code="USAGE",
        )
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
