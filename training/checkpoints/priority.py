"""Lets threads that save go behind those that train."""

from __future__ import annotations

import contextlib
import os
import sys
import threading


def step_back(levels: int) -> None:
    """Lower this thread's priority, and that of threads that it starts from now on."""
    if sys.platform == "linux":  # elsewhere a priority is of a whole process
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + levels)
