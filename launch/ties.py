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
