"""Which cores a process takes of those that SLURM gave to its job on this node."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import NamedTuple

CORES = "LOCKSTEP_CORES"  # tells the rest of the program how many cores this process may count on


class Share(NamedTuple):
    """What one process takes."""

    own: frozenset[int]  # the only cores to run on; none: those that it may run on now
    cores: int  # that it may count on


def share_of(allowed: Sequence[int], *, given: int, processes: int, number: int) -> Share:
    """The cores of process `number` of the `processes` of this node.

    `allowed` are those that it may run on, the threads of one core beside each other; `given` is how many
    SLURM gave to all of them. Where these are the same, the processes cut them up; where SLURM has bound
    each process to cores of its own, or nobody to any, they stay where they are.
    """
    cores = max(1, min(len(allowed), given // processes))
    if len(allowed) != given or not 1 < processes <= given:
        return Share(frozenset(), cores)
    return Share(frozenset(allowed[number * given // processes : (number + 1) * given // processes]), cores)


def take_cores(env: MutableMapping[str, str]) -> None:
    """Run on this process's share of the cores from now on, in a SLURM job; threads of any kind inherit that.

    `env` has been checked, and says how many processes there are here.
    """
    env.pop(CORES, None)  # of the process that has started this one
    given = env.get("SLURM_CPUS_ON_NODE", "")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", given) or not hasattr(os, "sched_setaffinity"):
        return
    processes, number = int(env.get("LOCAL_WORLD_SIZE", "1")), int(env.get("LOCAL_RANK", "0"))
    allowed = sorted(os.sched_getaffinity(0), key=lambda core: (_first_thread(core), core))
    share = share_of(allowed, given=int(given), processes=processes, number=number)
    if share.own:
        os.sched_setaffinity(0, share.own)
    env[CORES] = str(share.cores)


def _first_thread(core: int) -> int:
    """The lowest of the numbers under which the kernel offers the same core."""
    with contextlib.suppress(OSError):
        siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text("ascii")
        if first := re.match("[0-9]+", siblings):
            return int(first[0])
    return core
