"""Processes of a job that a test has started, known by a mark in their environment."""

from __future__ import annotations

import time
from pathlib import Path

MARK = "LOCKSTEP_TEST_RUN"  # names a job in the environment of all its processes
DEADLINE = 180  # seconds for anything, on a machine that is busy with others


def living(mark):
    """Every living process that carries the mark, found in /proc: children of children too."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                marked = f"{MARK}={mark}".encode() in (entry / "environ").read_bytes()
                dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if marked and not dead:
                found.append(int(entry.name))
    return found


def wait_until(look, *, within=DEADLINE):
    """The first truthy answer of `look`, None where there is none in time."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        if answer := look():
            return answer
        time.sleep(0.01)
    return None
