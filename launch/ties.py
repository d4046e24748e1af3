"""How a process's life is tied to the life of the launcher that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1  # prctl(2)
GRACE = 4.0  # seconds that a process goes on without its launcher, to save what it has
POLL = 0.5  # seconds
LAUNCHER = "LOCKSTEP_LAUNCHER"  # the variable with the process number of ours
AGENTS = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"}  # variables that others' launchers set
LEFT = 128 + signal.SIGTERM


def tie_to_launcher() -> None:
    """End when the launcher ends: it starts its processes in sessions of their own.

    The kernel sends SIGTERM, on which training stops and saves; whoever is not gone after the grace, because
    it waits for a process that is, leaves at once. Only under a launcher: what a shell started must outlive
    that shell (nohup).
    """
    ours = os.environ.get(LAUNCHER)
    if sys.platform == "linux" and (ours or AGENTS & os.environ.keys()):
        parent = os.getppid()
        die_with_parent(signal.SIGTERM)
        # It may have ended before the kernel knew that we mind.
        if (ours or str(parent)) != str(parent) or os.getppid() != parent:
            os._exit(LEFT)
        threading.Thread(target=_leave_after, args=(parent,), name="launcher-watch", daemon=True).start()


def die_with_parent(number: int) -> None:
    """Get this signal as soon as the thread that started this process ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _leave_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL)
    time.sleep(GRACE)
    os._exit(LEFT)
