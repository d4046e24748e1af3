"""What `scontrol show job` says of a job: its state, its log, and how it ended."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import NamedTuple

from launch.slurm.asking import ask
from training.config import UserError
from training.vigil.ending import EXIT_CODES

JOB = re.compile("[0-9]{1,12}(_[0-9]{1,12})?")  # JOB, or ARRAY_TASK
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE"}
OVER |= {"OUT_OF_MEMORY", "REVOKED"}
ANSWER = 20.0  # seconds for one answer
_STATE = re.compile(r"^ *JobState=(\S+) Reason=(\S+)", re.MULTILINE)
_ENDED = re.compile(r"^ *Requeue=.* ExitCode=(\d{1,5}):(\d{1,5})", re.MULTILINE)
_OUTPUT = re.compile(r"^ *StdOut=(.+)$", re.MULTILINE)


class Record(NamedTuple):
    """A job, or the task of an array, as SLURM sees it now."""

    state: str
    """PENDING, RUNNING, COMPLETED ..."""
    reason: str
    """why it is in that state; None where there is nothing to say"""
    output: Path | None
    """file that it writes what it says to"""
    exit_code: int
    """of the batch script, and 128 more than the signal where one ended it"""

    def words(self) -> str:
        """The state for a person."""
        return self.state if self.reason == "None" else f"{self.state} ({self.reason})"


def record_of(job: str) -> Record | None:
    """Ask SLURM; None where it does not answer. USAGE where it does not know the job, or it is an array."""
    answer = ask(["scontrol", "show", "job", job], within=ANSWER)
    records = _records(answer.said)
    if len(records) > 1:
        mend = f"one task of it: {job}_0, as squeue --me --array lists them"
        raise UserError(f"job {job} is an array of jobs", mend=mend, code="USAGE")
    if "Invalid job id" in answer.complaint:
        raise UserError(
            f"SLURM does not know job {job}, or not any more",
            mend="squeue --me lists your jobs; how a run ended is in its failure.json, if it failed",
            code="USAGE",
        )
    return records[0] if records else None


def newest_job(name: str | None) -> str:
    """The newest job of mine that waits or runs, of those called `name`; USAGE where there is none."""
    argv = ["squeue", "--me", "--noheader", "--format=%i", "--sort=-i"]
    answer = ask([*argv, f"--name={name}"] if name else argv, within=ANSWER)
    jobs = [line.strip() for line in answer.said.splitlines() if JOB.fullmatch(line.strip())]
    if answer.code == 0 and jobs:
        return jobs[0]
    called = f" called {name}" if name else ""
    what = answer.complaint_in_words() if answer.code else f"no job of yours{called} waits or runs"
    raise UserError(what, mend="give its number: lockstep launch --slurm --follow JOB", code="USAGE")


def _records(text: str) -> list[Record]:
    """Of each job in the answer; pure."""
    return [
        _record(part) for part in re.split(r"^(?=JobId=)", text, flags=re.MULTILINE) if _STATE.search(part)
    ]


def _record(text: str) -> Record:
    state = _STATE.search(text)
    assert state is not None
    output = _OUTPUT.search(text)
    ended = _ENDED.search(text)
    code, by_signal = (int(ended[1]), int(ended[2])) if ended else (0, 0)
    code = code or (128 + by_signal if by_signal else 0)
    if not code and state[1] in OVER - {"COMPLETED"}:
        # It never ran, or SLURM says nothing of how the script ended.
        code = 128 + signal.SIGTERM if state[1] == "CANCELLED" else EXIT_CODES["CRASH"]
    return Record(state[1], state[2], Path(output[1]) if output else None, code)
