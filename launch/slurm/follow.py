"""Shows what a SLURM job says, through its requeues, until it is over: `lockstep launch --slurm --follow`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.fault import fatal_line
from launch.slurm.records import JOB, OVER, Record, record_of
from training.config import UserError
from training.vigil.ending import EXIT_CODES

POLL = 2.0  # seconds between questions to the controller, which all users share
LOOK = 0.5  # seconds between looks at the log
SILENT = 300.0  # seconds without an answer of the controller, after which we stop asking
TAIL = 4096  # bytes of a log that is there already
BLOCK = 1 << 16  # bytes that are read at once


@dataclass
class Log:
    """The growing file that a job writes, shown from `position` (bytes) on."""

    path: Path
    position: int

    def show(self) -> None:
        """Copy what is new to stdout; a file that has become shorter was begun anew."""
        while text := self._next():
            sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()

    def _next(self) -> bytes:
        # It is not begun, cannot be seen from here, or its disk is slow: the next look may find it.
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self.position:
                self.position = 0
            file.seek(self.position)
            text = file.read(BLOCK)
            self.position += len(text)
            return text
        return b""


def follow(job: str, *, tail: bool = False) -> int:
    """Show what the job says until it is over, however often it is queued again; its exit code.

    With `tail`, of what it has said already the end only. USAGE where SLURM does not know the job,
    RENDEZVOUS where the controller does not answer any more, 130 after Ctrl-C: the job goes on without us.
    """
    if not JOB.fullmatch(job):
        raise UserError(
            f"--follow {job[:80]!r} is no number of a job", mend="--follow JOB or JOB_TASK", code="USAGE"
        )
    sys.stdout.flush()
    try:
        return _follow(job, tail=tail)
    except KeyboardInterrupt:
        _note(f"job {job} goes on. To stop it: scancel {job}; more: lockstep launch --slurm --follow {job}")
        return 130


def _follow(job: str, *, tail: bool) -> int:
    log: Log | None = None
    last = ""
    for record in _records(job):
        if log is None and record.output:
            log = Log(record.output, _last_lines(record.output) if tail else 0)
        if log:
            log.show()
        if record.words() == last and record.state in OVER:
            # Seen twice: a job that is queued again passes through some of these for a moment.
            return record.exit_code
        if record.words() != last:
            _note(f"job {job}: {record.words()}")
        last = record.words()
        for _ in range(round(POLL / LOOK)):
            time.sleep(LOOK)
            if log:
                log.show()
    hint = f"job {job} goes on without this; later: lockstep launch --slurm --follow {job}"
    line = fatal_line("RENDEZVOUS", rank=0, hint=hint)
    _note(f"error: SLURM has not answered for {SILENT:g} s\n{line}")
    return EXIT_CODES["RENDEZVOUS"]


def _last_lines(path: Path) -> int:
    """Where the last lines of a log begin; of a line that is too long, the first byte is a letter's."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - TAIL)
            file.seek(start)
            end = file.read(TAIL)
    except OSError:
        return 0
    if start == 0:
        return 0
    line = end.find(b"\n", 0, -1) + 1
    within_letter = len(end) - len(end.lstrip(bytes(range(0x80, 0xC0))))
    return start + (line or within_letter)


def _records(job: str) -> Iterator[Record]:
    """What SLURM says of the job, until it does not answer any more."""
    heard = time.monotonic()
    while time.monotonic() - heard < SILENT:
        record = record_of(job)
        if record is None:
            time.sleep(POLL)
            continue
        heard = time.monotonic()
        yield record


def _note(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
