"""What is known of the starts of a run: where each began, how it ended, and whether another one would help.

RUN/launches.jsonl has a line for each start of training processes. Starts that follow one another without a
person in between (restarts, requeues) count together: three of them without a newer checkpoint are enough.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.fault import USER_CODES, USER_EXIT
from training.vigil.ending import EXIT_CODES

RESTARTABLE = frozenset({EXIT_CODES["RENDEZVOUS"], EXIT_CODES["CRASH"], EXIT_CODES["HANG"]})
IN_VAIN = 3  # starts in a row without a newer checkpoint, after which no other one follows by itself
NO_PROGRESS = f"no progress in {IN_VAIN} starts"
LAUNCHES = "launches.jsonl"
MOST = 1 << 18  # bytes: longer files are not ours, and of ours the end is enough
_CHECKPOINT = re.compile(r"step-(\d{8,18})", re.ASCII)


class Stamp(NamedTuple):
    """What tells one failure.json from another at the same place."""

    inode: int
    changed: int  # ns


class Outcome(NamedTuple):
    """How the processes of one start ended."""

    exit_code: int
    name: str = ""  # of EXIT_CODES, where it has one
    what: str = ""  # in words, where that is known
    rank: int = 0
    spoken: bool = True  # whether a process has said so

    @property
    def restartable(self) -> bool:
        """Whether starting again may help; a program's own exit code is a crash by name."""
        return EXIT_CODES.get(self.name, self.exit_code) in RESTARTABLE


def exit_code_of(name: str) -> int:
    """The exit code that a name in failure.json stands for."""
    return USER_EXIT if name in USER_CODES else EXIT_CODES[name]


def name_of(exit_code: int) -> str:
    """The name of an exit code; empty where it has none, or several."""
    return next((name for name, code in EXIT_CODES.items() if code == exit_code), "")


def newest_step(run_dir: Path) -> int | None:
    """The step of the newest committed checkpoint; None where there is none."""
    steps = []
    with contextlib.suppress(OSError):
        for path in (run_dir / "checkpoints").iterdir():
            match = _CHECKPOINT.fullmatch(path.name)
            if match and (path / "MANIFEST.json").is_file():
                steps.append(int(match[1]))
    return max(steps, default=None)


def stamp_of(run_dir: Path) -> Stamp | None:
    """Of the failure.json that is there now; taken before a start, it tells that start's own from it."""
    with contextlib.suppress(OSError):
        status = (run_dir / "failure.json").stat()
        return Stamp(status.st_ino, status.st_mtime_ns)
    return None


def failure_of(run_dir: Path, since: Stamp | None) -> dict[str, Any] | None:
    """What RUN/failure.json says, if it is another one than when `since` was taken; None where it is not.

    `code` is a name that exit_code_of knows, `what`, `host` and `hint` are text, `rank` is a number, `step`
    one or None.
    """
    if stamp_of(run_dir) in (None, since):
        return None
    try:
        with (run_dir / "failure.json").open("rb") as file:
            failure = json.loads(file.read(MOST))
    except (OSError, ValueError, RecursionError):
        return None
    return failure if _is_failure(failure) else None


def _is_failure(failure: Any) -> bool:
    if not isinstance(failure, dict) or failure.get("code") not in [*EXIT_CODES, *USER_CODES]:
        return False
    texts = all(isinstance(failure.get(name), str) for name in ("what", "host", "hint"))
    rank, step = failure.get("rank"), failure.get("step")
    return texts and type(rank) is int and rank >= 0 and (step is None or type(step) is int)


def record_start(
    run_dir: Path, *, again: bool, processes: int, nodes: int, job: str | None = None
) -> list[int | None]:
    """Write down that a start begins now; the newest steps before it and before those that it follows.

    `again`: it follows the last one by itself. A disk that cannot be written to is for the run to report.
    """
    number, steps = _earlier(run_dir) if again else (0, [])
    steps.append(newest_step(run_dir))
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    line = {"start": number, "job": job, "step": steps[-1], "processes": processes, "nodes": nodes}
    with contextlib.suppress(OSError):
        run_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(line | {"time": now}) + "\n"
        # One write, so that a kill leaves a whole line or none.
        file = os.open(run_dir / LAUNCHES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)
    return steps


def steps_before(run_dir: Path) -> list[int | None]:
    """The newest steps before each start since a person last began one, and now."""
    return [*_earlier(run_dir)[1], newest_step(run_dir)]


def stuck(steps: Sequence[int | None]) -> bool:
    """Whether the last starts have not brought the run on: `steps` before each of them, and now."""
    numbers = [-1 if step is None else step for step in steps[-IN_VAIN - 1 :]]
    return len(numbers) > IN_VAIN and all(after <= before for before, after in pairwise(numbers))


def words_again(words: Sequence[str]) -> list[str]:
    """The arguments for a start that goes on from the last one: without --fresh."""
    left, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if word == "--fresh" and rest and not rest[0].startswith("--"):
            rest.pop(0)
        elif word.partition("=")[0] not in ("--fresh", "--no-fresh"):
            left.append(word)
    return left


def _earlier(run_dir: Path) -> tuple[int, list[int | None]]:
    """The number of the next start, and the steps before those since a person last began one."""
    number, steps = 0, list[int | None]()
    for start, step in _lines(run_dir):
        steps = [*([] if start == 0 else steps), step]
        number = start + 1
    return number, steps


def _lines(run_dir: Path) -> list[tuple[int, int | None]]:
    """(start, step) of each line that is whole."""
    try:
        with (run_dir / LAUNCHES).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MOST))
            text = file.read(MOST)
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            entry = json.loads(line)
            start, step = entry.get("start"), entry.get("step")
            if type(start) is int and start >= 0 and (step is None or type(step) is int):
                found.append((start, step))
    return found
