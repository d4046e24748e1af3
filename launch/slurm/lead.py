"""Whether a job is told early enough that its time is over: the lead of --signal against that of a save."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

SAVE_TIMES = "save_times.json"  # training writes it into the run directory
SPARE = 30.0  # seconds beside the save: SLURM's own slowness, the step under way
MOST = 1 << 12  # bytes: a longer file is not ours


class Lead(NamedTuple):
    """What is known of the end of a job's time."""

    seconds: int | None
    """before the end the job is told; None: it is not"""
    ends: float | None
    """when its time is over, seconds since 1970; None: never"""


def save_seconds(run_dir: Path) -> float | None:
    """Seconds that saving and stopping took at the worst, of the last start; None: nothing was measured."""
    try:
        with (run_dir / SAVE_TIMES).open("rb") as file:
            times = json.loads(file.read(MOST))
        measured = [float(value) for value in times.values()]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    measured = [value for value in measured if math.isfinite(value) and value >= 0]
    return max(measured, default=None)


def needed(seconds: float) -> int:
    """The lead that goes with a save of so many seconds, rounded up to tens."""
    return math.ceil((2 * seconds + SPARE) / 10) * 10


def warning(lead: Lead, seconds: float | None) -> str:
    """What to tell a person; empty where all is well or nothing is known; pure."""
    if lead.ends is None or seconds is None:
        return ""
    if lead.seconds is None:
        told = "nothing in the script has SLURM say before that the time is over"
    elif lead.seconds < 2 * seconds + SPARE:
        told = f"--signal says {lead.seconds} s before that the time is over"
    else:
        return ""
    enough = needed(seconds)
    return f"saving took {seconds:.3g} s, and {told}: write #SBATCH --signal=B:USR1@{enough} into the script"


def given_lead(text: str | None) -> int | None:
    """The seconds that a variable gives: 300, or the SIGNAL@300 of SBATCH_SIGNAL; None where it does not."""
    digits = (text or "").rpartition("@")[2]
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 6 else None
