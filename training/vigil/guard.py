"""Starts a small program beside a process, for when that one never gives up the interpreter's lock again.

Then no thread of it runs, its vigil neither. Where other processes see to it, the program comes too late.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from training.vigil.ending import Failure
from training.vigil.place import Place
from training.vigil.siblings import Sibling
from training.vigil.stacks import path_of

PROGRAM = Path(__file__).parent / "guard_program.py"
ALONE, AMONG_OTHERS = 1.0, 2.0  # seconds after the limit: others find a hang sooner, and know more


class Guard:
    """The other end of the program's standard input."""

    def __init__(self, me: Sibling, hang_seconds: float) -> None:
        self._me, self._hang_seconds = me, hang_seconds
        self._pipe = -1
        if sys.platform == "linux" and sys.executable:
            command = [sys.executable, "-I", "-S", str(PROGRAM), str(os.getpid())]
            program = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
            )
            assert program.stdin is not None
            # Of its own, so that nothing closes it with the object that is let go here.
            self._pipe = os.dup(program.stdin.fileno())
            os.set_blocking(self._pipe, False)

    def reassure(self, near: Sequence[Sibling], place: Place, *, alone: bool) -> None:
        """All is well; what to do with the processes of this machine should this not be said again."""
        if self._pipe < 0 or place.run_dir is None:
            return
        what = f"error: no progress for {self._hang_seconds:g} seconds: "
        what += (
            f"process {self._me.rank}, last seen in step {place.done}, never gives up the interpreter's lock"
        )
        hint = f"see {place.run_dir}/stacks; start the same command again to resume"
        failure = Failure("HANG", self._me.rank, self._me.host, what, hint, place.done, tuple(place.samples))
        order = {
            "patience": self._hang_seconds + (ALONE if alone else AMONG_OTHERS),
            "stops_are_meant": alone,
            "processes": [
                (one.pid, f"/proc/{one.pid}/fd/{one.stacks}", str(path_of(place.run_dir, one.rank)))
                for one in near
            ],
            "failure": str(place.run_dir / "failure.json"),
            "failure_text": failure.as_text() + "\n",
            "words": f"{what}\n{failure.line()}\n",
        }
        with contextlib.suppress(OSError):  # it is gone: then so be it
            os.write(self._pipe, json.dumps(order).encode() + b"\n")
