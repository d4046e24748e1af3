"""What a job asks of SLURM about itself: by argument lists only, and not for long, for it may be down."""

from __future__ import annotations

import datetime
import itertools
import re
import shlex
import signal
import subprocess
from typing import NamedTuple

PATIENCE = 20.0  # seconds for the controller to answer


class JobFacts(NamedTuple):
    """What SLURM says of a job."""

    state: str
    """RUNNING, or what it has decided: COMPLETING, CANCELLED ..."""
    requeue: bool
    """whether it may be requeued: --requeue, --no-requeue"""
    batch: bool
    """whether it has a batch script; a shell of salloc has none"""
    ends: float | None
    """when its time is over, seconds since 1970, or was, once it is ending; None: never"""
    time_is_over: bool = False
    """whether it is ending because of that"""


def job_facts(job: str) -> JobFacts | None:
    """Of a job, by its number or ARRAY_TASK; None where SLURM does not say."""
    said = _asked("scontrol", "--oneliner", "show", "job", job)
    return None if said is None else parse_job(said)


def parse_job(text: str) -> JobFacts | None:
    """The first job of what `scontrol --oneliner show job` prints; pure, but for the time zone."""
    fields = dict(
        re.findall(r"(?:^| )(JobState|Reason|Requeue|BatchFlag|EndTime)=(\S+)", text.partition("\n")[0])
    )
    if "JobState" not in fields:
        return None
    ends = None
    if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", fields.get("EndTime", "")):
        ends = datetime.datetime.fromisoformat(fields["EndTime"]).timestamp()
    requeue, batch = fields.get("Requeue") == "1", fields.get("BatchFlag") == "1"
    return JobFacts(fields["JobState"], requeue, batch, ends, fields.get("Reason") == "TimeLimit")


def requeue(job: str) -> str:
    """Let the job start again; empty, or why SLURM does not."""
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except FileNotFoundError:
        return "scontrol is not on PATH"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"scontrol requeue: {error}"
    # SLURM ends what runs in the job, this scontrol among it, maybe before that has heard that all is well.
    if done.returncode in (0, -signal.SIGTERM):
        return ""
    return f"scontrol requeue: {' '.join(done.stderr.split()) or 'it failed'}"


def announced_seconds(job: str) -> int | None:
    """How long before its time is over the job's script has SLURM say so; None where it has not."""
    script = _asked("scontrol", "write", "batch_script", job, "-")
    return None if script is None else parse_lead(script)


def parse_lead(script: str) -> int | None:
    """SECONDS of the last `#SBATCH --signal=[B:]SIGNAL@SECONDS` of a script; pure."""
    found = None
    for line in script.splitlines():
        if line.strip() and not line.startswith("#"):
            break  # SLURM reads no options behind the first command
        words = _option_words(line)
        for word, after in itertools.pairwise([*words, ""]):
            value = after if word == "--signal" else word.removeprefix("--signal=")
            match = re.fullmatch(r"(?:[RB]+:)?\w+(?:@(\d{1,5}))?", value)
            if word.startswith("--signal") and match:
                found = int(match[1] or 60)  # SLURM's own default
    return found


def _option_words(line: str) -> list[str]:
    if not line.startswith("#SBATCH"):
        return []
    try:
        return shlex.split(line.removeprefix("#SBATCH"), comments=True)
    except ValueError:
        return []


def node_address(host: str) -> str:
    """Where a node is reached, as SLURM knows it; its name where it does not say."""
    said = _asked("scontrol", "--oneliner", "show", "node", host) or ""
    match = re.search(r"\bNodeAddr=([A-Za-z0-9._:-]+)", said)
    return match[1] if match else host


def end_steps(job: str, name: str) -> bool:
    """End those sruns of the job that have this name; whether there were any."""
    said = _asked("squeue", "--noheader", "--steps", "--jobs", job, "--format", "%i %j") or ""
    steps = [words[0] for words in map(str.split, said.splitlines()) if words[1:] == [name]]
    for step in steps:
        _asked("scancel", "--signal=KILL", step)
    return bool(steps)


def _asked(*words: str) -> str | None:
    """What a command of SLURM prints; None where it is not there, fails, or does not end."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
