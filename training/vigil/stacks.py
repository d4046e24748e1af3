"""Stack traces of every thread of every process, also of one that does not answer."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

from training.vigil.siblings import Sibling

WAIT = 0.4  # seconds for a process to write its stacks after the signal


def prepare() -> int:
    """From now on SIGUSR2 writes this process's stacks into a file in memory: its descriptor, -1 if none.

    The handler is C and needs no lock of the interpreter, so a loop that never gives it up is seen too.
    """
    if sys.platform != "linux":
        return -1
    file = os.memfd_create("stacks")
    faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
    return file


def path_of(run_dir: Path, rank: int) -> Path:
    """Where the stacks of a process go."""
    return run_dir / "stacks" / f"rank-{rank}.txt"


def write_own(run_dir: Path, rank: int) -> None:
    """Write the stacks of all threads of this process."""
    path = path_of(run_dir, rank)
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)


def end_one_that_does_not_answer(run_dir: Path | None, sibling: Sibling) -> None:
    """Write the stacks of another process of this machine, then kill it; several may try at once.

    A stopped one goes on for that moment: the signal that makes it write is first in the queue.
    """
    try:
        if run_dir is not None and sibling.stacks >= 0:
            _take(sibling, path_of(run_dir, sibling.rank))
    except FileExistsError:  # it has written them itself, or another process is at it
        time.sleep(2 * WAIT)
    except OSError:
        pass  # a full disk is no reason to let it live
    with contextlib.suppress(OSError):
        os.kill(sibling.pid, signal.SIGKILL)


def _take(sibling: Sibling, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:
        os.kill(sibling.pid, signal.SIGUSR2)
        os.kill(sibling.pid, signal.SIGCONT)
        time.sleep(WAIT)
        file.write(Path(f"/proc/{sibling.pid}/fd/{sibling.stacks}").read_bytes())


def forget(run_dir: Path) -> None:
    """Remove the stacks of an earlier start."""
    with contextlib.suppress(OSError):
        for path in (run_dir / "stacks").glob("rank-*.txt"):
            path.unlink()
        (run_dir / "stacks").rmdir()
