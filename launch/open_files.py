"""How many files and connections a process may hold open: as many as the machine allows."""

from __future__ import annotations

import resource

from training.config import UserError

WANTED = 1 << 16
LEAST = 128  # shards, connections to the other processes, and what Python itself holds


def allow_open_files() -> None:
    """Raise this process's own limit as far as it may be raised; USAGE where that is too little to train.

    What the shell sets by itself is small (1024), for programs of an older kind.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if most < LEAST:
        raise UserError(
            f"this process may open {most} files and connections, and needs {LEAST} (ulimit -n)",
            mend=f"raise the limit before the start: ulimit -n {max(1024, LEAST)}",
            code="USAGE",
        )
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
