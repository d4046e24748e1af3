"""What may stand in an #SBATCH line: each value is checked before it gets into a script; pure."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from launch.options import Options
from training.config import UserError

NAME_LENGTH = 64  # letters of a job's name
SIGNAL_MOST = 65535  # seconds; sbatch(1), --signal
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LIST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,@+:/-]{0,255}")
_SPAN = r"[0-9]{1,9}(?:-[0-9]{1,9}(?::[0-9]{1,9})?)?"
_ARRAY = re.compile(rf"{_SPAN}(?:,{_SPAN})*(?:%[1-9][0-9]{{0,8}})?")
# As sbatch(1), --time, lists them, and what a unit of each part is, in seconds.
_TIMES = (
    (re.compile(r"([0-9]+)"), (60,)),
    (re.compile(r"([0-9]+):([0-9]{1,2})"), (60, 1)),
    (re.compile(r"([0-9]+):([0-9]{1,2}):([0-9]{1,2})"), (3600, 60, 1)),
    (re.compile(r"([0-9]+)-([0-9]{1,2})"), (86400, 3600)),
    (re.compile(r"([0-9]+)-([0-9]{1,2}):([0-9]{1,2})"), (86400, 3600, 60)),
    (re.compile(r"([0-9]+)-([0-9]{1,2}):([0-9]{1,2}):([0-9]{1,2})"), (86400, 3600, 60, 1)),
)


def check_values(options: Options, *, time: str, lead: int | None) -> None:
    """USAGE where a value is none that sbatch takes, or would end its line; all of them at once.

    `lead`: seconds before the limit `time` that the job is told; None where it is not.
    """
    faults = []
    if options.job_name is not None and not is_name(options.job_name):
        faults.append(
            f"--job-name {_shown(options.job_name)}: letters, digits, dots, dashes and underscores, "
            f"{NAME_LENGTH} at most"
        )
    for flag, value in (("partition", options.partition), ("account", options.account), ("qos", options.qos)):
        if value is not None and not _LIST.fullmatch(value):
            faults.append(f"--{flag} {_shown(value)}: no name that SLURM knows is written so")
    if options.array is not None and not _ARRAY.fullmatch(options.array):
        faults.append(f"--array {_shown(options.array)}: numbers as in 0-5, 1,3,7 or 0-5%2")
    faults += _time_faults(time, lead)
    faults += _process_faults(options)
    for raw in options.sbatch:
        faults += _raw_faults(raw)
    if faults:
        mend = "lockstep launch --help says what each option takes; man sbatch says more"
        raise UserError("\n".join(faults), mend=mend, code="USAGE")


def seconds_of(time: str) -> int | None:
    """Minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, in seconds; None if it is none of them."""
    for pattern, units in _TIMES:
        if len(time) <= 16 and (match := pattern.fullmatch(time)) and time.isascii():
            return sum(int(part) * unit for part, unit in zip(match.groups(), units, strict=True))
    return None


def is_name(text: str) -> bool:
    """Whether a job may be called so: it becomes part of a file's name."""
    return len(text) <= NAME_LENGTH and _NAME.fullmatch(text) is not None


def name_after(config: str) -> str:
    """A job's name after the recipe or file that it trains."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(config).stem).lstrip(".-")[:NAME_LENGTH] or "train"


def raw_words(raw: str) -> str:
    """An option of sbatch as its line holds it: sbatch knows quotes, but reads a backslash inside of them."""
    return " ".join(shlex.quote(word).replace("\\", "\\\\") for word in shlex.split(raw))


def printable(text: str) -> bool:
    """Whether a text has no control character in it; those end lines and play tricks on terminals."""
    return not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", text)


def _time_faults(time: str, lead: int | None) -> list[str]:
    seconds = seconds_of(time)
    if seconds is None:
        return [f"--time {_shown(time)}: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS"]
    if lead is None:
        return []
    if lead > SIGNAL_MOST:
        return [f"--signal-seconds {lead}: {SIGNAL_MOST} at most"]
    if lead >= seconds:
        return [f"--signal-seconds {lead} --time {time}: the job would be stopped as soon as it starts"]
    return []


def _process_faults(options: Options) -> list[str]:
    processes, gpus = options.processes_per_node, options.gpus
    if gpus and processes not in (None, gpus):
        return [f"--processes-per-node {processes} --gpus {gpus}: there is one process for each GPU"]
    return []


def _raw_faults(raw: str) -> list[str]:
    if not printable(raw):
        return [f"--sbatch {_shown(raw)}: one line, without control characters"]
    try:
        words = shlex.split(raw)
    except ValueError as error:
        return [f"--sbatch {_shown(raw)}: {str(error).lower()}"]
    if not words or not re.match("--?[A-Za-z]", words[0]):
        return [f'--sbatch {_shown(raw)}: an option of sbatch, as in --sbatch="--constraint=a100"']
    return []


def _shown(text: str) -> str:
    return repr(text if len(text) <= NAME_LENGTH else text[:NAME_LENGTH] + "...")
