"""The program beside a process that ends it when it says nothing any more; it imports nothing of ours.

It reads lines of JSON: each means that all is well, and says what to do should no other follow.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

TICK = 0.5  # seconds
WAIT = 0.4  # seconds for a process to write its stacks after the signal


def watch(parent: int) -> None:
    """Return when the parent has ended, by itself or by us."""
    order: dict[str, Any] = {}
    rest, silence = b"", 0.0
    while os.getppid() == parent:
        if select.select([0], [], [], TICK)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            if lines:
                order, silence = json.loads(lines[-1]), 0.0
        elif not (order and order["stops_are_meant"] and _is_stopped(parent)):
            # Looks are counted, not the clock: while the whole machine sleeps, this program does too.
            silence += TICK
        if order and silence >= order["patience"]:
            _end(order)
            return


def _is_stopped(number: int) -> bool:
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[0] in "Tt"
    return False


def _end(order: dict[str, Any]) -> None:
    """Write the stacks of all processes here, say what was ordered, and kill them."""
    for number, _, _ in order["processes"]:
        for sign in (signal.SIGUSR2, signal.SIGCONT):
            with contextlib.suppress(OSError):
                os.kill(number, sign)
    time.sleep(WAIT)
    for _, written, to in order["processes"]:
        with contextlib.suppress(OSError):
            Path(to).parent.mkdir(exist_ok=True)
            Path(to).write_bytes(Path(written).read_bytes())
    first = True
    try:
        with Path(order["failure"]).open("x", encoding="utf-8") as file:
            file.write(order["failure_text"])
    except FileExistsError:
        first = False
    except OSError:
        pass
    if first:
        sys.stderr.write(order["words"])
        sys.stderr.flush()
    for number, _, _ in order["processes"]:
        with contextlib.suppress(OSError):
            os.kill(number, signal.SIGKILL)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # meant for the processes, which end this program with them
    watch(int(sys.argv[1]))
