"""The batch script of a job: options and the arguments of training/run.py to text; pure.

The scripts in slurm/ are what comes out for no options, with the script's own arguments handed on. To write
one of them anew: python -c "from launch.slurm.script import shipped; print(shipped('train'), end='')"
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from launch.options import Options
from launch.slurm.sbatch_values import check_values, printable, raw_words
from training.config import UserError

TIME = "12:00:00"  # where nobody said how long
TASK = "{task}"  # in the arguments: the number of the array's task
WHY_COLUMN = 36
FEWER = "without GPUs, SLURM may begin with the smaller number"


class Line(NamedTuple):
    """A line of the #SBATCH block."""

    option: str
    why: str = ""
    used: bool = True  # or there for the user to take up


def render(
    options: Options, words: Sequence[str] | None = None, *, mode: str = "train", name: str | None = None
) -> str:
    """The script of a job called `name` that runs training/run.py with `words`; None: with its own arguments.

    USAGE where an option, or a word, cannot stand in a script.
    """
    if words is not None:
        mode, words = _split_mode(words)
    lead = options.signal_seconds if mode == "train" else None
    check_values(options, time=options.time or TIME, lead=lead)
    lines = [
        "#!/bin/bash",
        *_heading(mode, own=words is None),
        *map(_text_of, _block(options, mode, name or options.job_name or mode, own=words is None)),
        "",
        *_body(options, mode, words),
    ]
    return "\n".join(lines) + "\n"


def shipped(mode: str) -> str:
    """The script slurm/MODE.sbatch: sbatch [options of sbatch] slurm/MODE.sbatch [arguments]."""
    return render(Options(), mode=mode)


def _split_mode(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    if any(not printable(word) for word in words):
        raise UserError(
            f"{next(word for word in words if not printable(word))[:80]!r} holds control characters",
            mend="give arguments that are one line of text each",
            code="USAGE",
        )
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    return "train", words


def _heading(mode: str, *, own: bool) -> Iterator[str]:
    if own:
        needs = "" if mode == "train" else "--run-dir RUN "
        yield f"# sbatch [options of sbatch] slurm/{mode}.sbatch {needs}[arguments of training/run.py {mode}]"
        yield "# Edit the #SBATCH lines, or give the same options to sbatch, which go first."
    else:
        yield "# Written by lockstep launch --slurm."


def _block(options: Options, mode: str, name: str, *, own: bool) -> Iterator[Line]:
    yield Line(f"--job-name={name}")
    for option in ("partition", "account", "qos", "array"):
        value = getattr(options, option)
        if value is not None:
            yield Line(f"--{option}={value}")
    least = f"{options.min_nodes}-" if options.least_nodes < options.nodes else ""
    # Seen of SLURM 22.05: as many as are free where GPUs are asked for, else the smaller number.
    yield Line(f"--nodes={least}{options.nodes}", FEWER if least and not options.gpus else "")
    yield from _own_processes() if own else _processes(options)
    yield Line(f"--time={options.time or TIME}")
    if mode == "train":
        why = "so many seconds before the limit it saves, stops and is queued again"
        yield Line(f"--signal=B:USR1@{options.signal_seconds}", why)
        yield Line("--requeue", "it goes on after preemption, or when a node is lost")
    else:
        yield Line("--requeue", "it begins anew after preemption, or when a node is lost")
    yield Line("--open-mode=append", "each start goes on in the same log")
    yield Line(f"--output=%x-{'%j' if options.array is None else '%A_%a'}.out")
    # The last of two options alike counts, so what was said in so many words does.
    yield from (Line(raw_words(raw)) for raw in options.sbatch)


def _own_processes() -> Iterator[Line]:
    yield Line("--ntasks-per-node=1", "processes of each node, where it has no GPUs")
    yield Line("--cpus-per-task=4", "cores of each", used=False)
    yield Line("--gpus-per-node=8", "GPUs of each node, with a process for each", used=False)
    yield Line("--cpus-per-gpu=8", "cores of each", used=False)


def _processes(options: Options) -> Iterator[Line]:
    if options.gpus:
        yield Line(f"--gpus-per-node={options.gpus}", "a process for each")
    else:
        yield Line(f"--ntasks-per-node={options.processes_per_node or 1}", "processes of each node")
    if options.cpus:
        yield Line(f"--cpus-per-{'gpu' if options.gpus else 'task'}={options.cpus}")


def _text_of(line: Line) -> str:
    text = f"{'#' if line.used else '##'}SBATCH {line.option}"
    return f"{text:<{WHY_COLUMN}}  # {line.why}" if line.why else text


def _body(options: Options, mode: str, words: Sequence[str] | None) -> Iterator[str]:
    yield "set -eu"
    yield 'cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}"'
    yield "PATH=$PATH:$PWD/.venv/bin  # where make setup puts lockstep, should no environment be active"
    yield "if ! command -v lockstep > /dev/null; then"
    yield f'    echo "{NO_LOCKSTEP}" >&2'
    yield "    exit 2"
    yield "fi"
    own = ["--cpu"] if options.cpu else []
    own += ["--max-restarts", str(options.max_restarts)] if options.max_restarts else []
    own += ["--wait", f"{options.wait:g}"] if options.wait != Options().wait else []
    start = shlex.join(["exec", "lockstep", "launch", *own, "--", mode])
    if words is None:
        yield f"task=${{SLURM_ARRAY_TASK_ID-'{TASK}'}}  # in an array of jobs it stands for {TASK}"
        yield f'{start} "${{@//\\{{task\\}}/$task}}"'
    else:
        yield " ".join([start, *(_word(word, array=options.array is not None) for word in words)])


NO_LOCKSTEP = (
    "lockstep is neither on this job's PATH nor in .venv: activate its environment before you type sbatch"
)


def _word(word: str, *, array: bool) -> str:
    """A word quoted for bash; in an array of jobs TASK in it becomes the task's number."""
    parts = word.split(TASK) if array else [word]
    return '"$SLURM_ARRAY_TASK_ID"'.join(
        shlex.quote(part) if part or len(parts) == 1 else "" for part in parts
    )
