"""Ends a process that a plain `srun` has started when that srun is gone, which SLURM does not see to.

SLURM lets the tasks of an srun that was killed go on for ever where no batch script is around them. A task
sees it all the same: its step daemon holds a connection to srun, and the kernel closes that one with srun.
Connections alone prove nothing, so srun's own port is then asked. It complains of whoever asks without a
message, so it is asked only then.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from launch.ties import GRACE

POLL = 1.0  # seconds
PATIENCE = 3.0  # seconds for srun's host to answer
ESTABLISHED = "01"  # in /proc/net/tcp
CONNECTIONS = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6"))


class Srun(NamedTuple):
    """Where srun takes messages."""

    host: str  # an address, not a name
    port: int


def tie_to_srun() -> None:
    """Stop when the srun is gone that has started this process: save, then leave after a grace.

    Nothing where something else sees to that: an agent between srun and this process, or `lockstep launch`
    as the job's batch script.
    """
    srun = srun_of(os.environ)
    if srun is not None and sys.platform == "linux":
        threading.Thread(target=_watch, args=(srun,), name="srun-watch", daemon=True).start()


def srun_of(env: Mapping[str, str]) -> Srun | None:
    """The srun that a process with these variables is tied to; pure."""
    others = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "LOCKSTEP_LAUNCHER", "LOCKSTEP_START"}
    host, port = env.get("SLURM_SRUN_COMM_HOST", ""), env.get("SLURM_SRUN_COMM_PORT", "")
    if others & env.keys() or not env.get("SLURM_STEP_ID") or not (port.isascii() and port.isdigit()):
        return None
    return Srun(host, int(port)) if int(port) < 1 << 16 and address_in_hex(host) else None


def address_in_hex(host: str) -> str:
    """An address as /proc/net/tcp writes it: words of four bytes, each in the machine's order."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            packed = socket.inet_pton(family, host)
        except (OSError, ValueError):
            continue
        words = [packed[start : start + 4] for start in range(0, len(packed), 4)]
        return b"".join(word[::-1] if sys.byteorder == "little" else word for word in words).hex().upper()
    return ""


def connections_to(host: str, tables: str) -> frozenset[str]:
    """The connections with a host that both ends hold, of the lines of /proc/net/tcp; pure."""
    address = address_in_hex(host)
    found = set()
    for line in tables.splitlines():
        fields = line.split()
        if len(fields) > 3 and fields[2].rpartition(":")[0] == address and fields[3] == ESTABLISHED:
            found.add(f"{fields[1]} {fields[2]}")
    return frozenset(found)


def _watch(srun: Srun) -> None:
    # What is there twice is no connection of the moment, of the controller's for example.
    held = _held(srun)
    time.sleep(POLL)
    held &= _held(srun)
    while held:
        time.sleep(POLL)
        there = _held(srun)
        if held <= there:
            continue
        if _is_gone(srun):
            break
        held &= there
    else:
        return
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


def _held(srun: Srun) -> frozenset[str]:
    tables = [path.read_text(encoding="ascii") for path in CONNECTIONS if path.exists()]
    return connections_to(srun.host, "\n".join(tables))


def _is_gone(srun: Srun) -> bool:
    """Whether srun's host says that nobody takes its messages; one that does not answer says nothing."""
    try:
        socket.create_connection(srun, timeout=PATIENCE).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
