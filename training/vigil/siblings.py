"""The processes of a job: who they are, and how one that is gone came to its end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import NamedTuple

ON_DEMAND = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes
# linux/pidfd.h: a record of 64 bytes that opens with what is asked for and ends with the exit status.
PIDFD_INFO_SIZE, PIDFD_INFO_EXIT = 64, 1 << 3
PIDFD_GET_INFO = (3 << 30) | (PIDFD_INFO_SIZE << 16) | (0xFF << 8) | 11


class Sibling(NamedTuple):
    """A process of the job, as it introduces itself to the others."""

    rank: int
    host: str
    machine: str  # equal where one process may look at the other in /proc
    pid: int
    stacks: int  # its file descriptor that its stack traces go to, -1: none
    port: int  # where it takes connections, 0: nowhere
    token: str  # what a connection must say


def introduce(rank: int, *, stacks: int, port: int = 0, token: str = "") -> Sibling:
    """This process."""
    return Sibling(rank, socket.gethostname(), _machine(), os.getpid(), stacks, port, token)


def _machine() -> str:
    """A name for this boot of this machine and for what numbers its processes: containers have their own."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - a link that names no path
    return f"{socket.gethostname()} {os.getpid()}"


def how_it_ended(pid: int, file: int | None = None) -> str:
    """In words, of a process that has ended.

    Its status can be read until its parent has collected it (srun's does so at once), and from then on by
    its descriptor `file`. Empty where it left because a person or the end of its launcher made it: there is
    nothing to explain.
    """
    status = None
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = _fields(pid)
        status = int(fields[-1]) if fields[0] in "ZX" else None
    if status is None and file is not None:
        status = _collected_status(file)
    if status is None:
        return "is gone"
    if not os.WIFSIGNALED(status):
        if os.waitstatus_to_exitcode(status) in ON_DEMAND:
            return ""
        return f"ended with exit code {os.waitstatus_to_exitcode(status)}, without a word"
    number = os.WTERMSIG(status)
    words = f"was killed by signal {number} ({signal.Signals(number).name})"
    return f"{words}, as the kernel does where memory runs out" if number == signal.SIGKILL else words


def _collected_status(file: int) -> int | None:
    """What the parent of an ended process was told; kernels before 6.15 do not keep it."""
    answer = bytearray(struct.pack("Q", PIDFD_INFO_EXIT).ljust(PIDFD_INFO_SIZE, b"\0"))
    with contextlib.suppress(OSError):
        fcntl.ioctl(file, PIDFD_GET_INFO, answer)
        (mask,) = struct.unpack_from("Q", answer)
        if mask & PIDFD_INFO_EXIT:
            return int.from_bytes(answer[-4:], sys.byteorder, signed=True)
    return None


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped from outside (SIGSTOP, Ctrl-Z, a debugger)."""
    with contextlib.suppress(OSError, IndexError):
        return _fields(pid)[0] in "Tt"
    return False


def _fields(pid: int) -> list[str]:
    """What /proc/PID/stat says behind the name: from the state to the exit code."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
