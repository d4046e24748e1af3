"""Ends a worker process when the process that started it ends, however that one ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent(sign: int = signal.SIGKILL) -> None:
    """Let the kernel send `sign` to this process when the thread that started it ends; nothing but on Linux.

    To be called first in a worker. A parent that died before this call sends nothing any more, so it is
    looked for once.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(sign))
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os.kill(os.getpid(), sign)
