"""What of a machine decides the last bits of a training: recorded in checkpoints, compared at every start."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline.fault import UserError

Facts = Mapping[str, Any]


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Threads of an operation, processor and version of torch, as plain JSON."""
    if device.type == "cuda":
        name = f"{device.type}: {torch.cuda.get_device_name(device)}"
    else:
        name = f"{device.type}: {_processor()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"threads": torch.get_num_threads(), "device": name, "torch": torch.__version__}


def check_alike(everyone: Sequence[Facts]) -> None:
    """CONFIG where a process computes on another kind of machine than process zero."""
    zero, *others = everyone
    lines = [
        f"process {rank} differs from process 0: {name} {theirs[name]}, not {zero[name]}"
        for rank, theirs in enumerate(others, 1)
        for name in _differing(zero, theirs)
    ]
    if lines:
        raise UserError(
            "\n".join(f"train.exact: {line}" for line in lines),
            mend="give all processes machines of one kind and the same OMP_NUM_THREADS, or set "
            "--train.exact false",
            code="CONFIG",
        )


def check_machine(recorded: Facts, now: Facts, *, exact: bool, allowed: bool) -> list[str]:
    """What there is to say of a machine that is not the one of the checkpoint; RESUME in exact mode.

    `allowed`: the user has asked to go on all the same.
    """
    differing = _differing(recorded, now)
    lines = [f"{name} was {recorded[name]}, is {now[name]}" for name in differing]
    if not exact:
        # Threads come and go with the number of processes, and other last bits were never excluded.
        told = [line for name, line in zip(differing, lines, strict=True) if name != "threads"]
        return [f"{line}: last bits may differ from here on" for line in told]
    if lines and not allowed:
        threads = f"set OMP_NUM_THREADS={recorded['threads']}"
        again = [threads if name == "threads" else f"use the {name} of before" for name in differing]
        raise UserError(
            "\n".join(f"train.exact: the last bits would differ from here on: {line}" for line in lines),
            mend=f"{', '.join(again)}; to go on all the same: --allow-config-change",
            code="RESUME",
        )
    return [f"changed as asked for: {line}: last bits may differ from here on" for line in lines]


def _differing(before: Facts, now: Facts) -> list[str]:
    """The names of what decides and differs; of what was not recorded nothing is known."""
    decisive = [name for name in now if name in before]
    if not str(now["device"]).startswith("cpu"):
        # A GPU adds up its own way, whatever its host does.
        decisive.remove("threads")
    return [name for name in decisive if before[name] != now[name]]


def _processor() -> str:
    """The model of the CPU, as its maker calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
