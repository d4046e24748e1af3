"""Submits a run to SLURM: `lockstep launch --slurm`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline.command_line import counted, say
from data_pipeline.fault import fatal_line
from launch.options import Options
from launch.slurm.asking import LATE, ask
from launch.slurm.follow import follow
from launch.slurm.records import Record, newest_job, record_of
from launch.slurm.run_name import job_name_of, run_directory
from launch.slurm.sbatch_values import name_after
from launch.slurm.script import TASK, TIME, render
from training.command import Request, read_request
from training.config import UserError
from training.vigil.ending import EXIT_CODES

SUBMIT = ("sbatch", "--parsable")
# Why a job waits that the end of no other will help.
NEVER = ("PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit", "BadConstraints")
JUDGED = 3.0  # seconds, about, until SLURM says why a job waits
LOOK = 0.3  # seconds
# A variable of sbatch goes before the script's line. These say what stops, requeues and is logged.
_OURS = ("SBATCH_SIGNAL", "SBATCH_REQUEUE", "SBATCH_NO_REQUEUE", "SBATCH_OPEN_MODE", "SBATCH_JOB_NAME")
_VARIABLES = {
    "time": "SBATCH_TIMELIMIT",
    "partition": "SBATCH_PARTITION",
    "account": "SBATCH_ACCOUNT",
    "qos": "SBATCH_QOS",
    "array": "SBATCH_ARRAY_INX",
    "gpus": "SBATCH_GPUS_PER_NODE",
}


def submit(options: Options, words: Sequence[str]) -> int:
    """Submit the job, or show with --dry-run what would be; the exit code of the job where it is followed.

    Without words, --follow shows a job that is there. USAGE and CONFIG before anything is queued.
    """
    if options.follow is not None and not (words and not options.follow):
        return _follow_only(options, words)
    request = read_request(_first_words(options, words))
    if request is None:
        return 0
    _check_run(options, request, words)
    name = options.job_name or name_after(request.flags.config)
    script = render(options, words, name=name).encode("utf-8", "surrogateescape")
    if options.dry_run:
        # Nothing but the script on stdout, so that it can be kept: ... --dry-run ... > mine.sbatch
        sys.stdout.flush()
        sys.stdout.buffer.write(script)
        sys.stdout.buffer.flush()
        sys.stderr.write(f"not submitted: --dry-run; else {shlex.join(SUBMIT)} would read this script\n")
        return 0
    answer = ask(SUBMIT, script=script, env=submitting_environment(os.environ, options))
    if answer.code == LATE:
        hint = "look with squeue --me whether the job is there before you submit it again"
        line = fatal_line("RENDEZVOUS", rank=0, hint=hint)
        sys.stderr.write(f"error: {answer.complaint}\n{line}\n")
        return EXIT_CODES["RENDEZVOUS"]
    number = re.match(r"[0-9]+", answer.said)
    if answer.code != 0 or number is None:
        raise UserError(
            f"SLURM refuses the job: {answer.complaint_in_words()}",
            mend="sinfo lists partitions, their nodes and limits; --dry-run shows the script",
            code="USAGE",
        )
    sys.stderr.write(answer.complaint)
    _tell(options, request, name, number[0])
    if options.array is not None and not any(TASK in word for word in words):
        say(f"  note     all tasks get the same arguments; {TASK} in them would be a task's number")
    return follow(number[0]) if options.follow is not None else 0


def submitting_environment(env: Mapping[str, str], options: Options) -> dict[str, str]:
    """The environment for sbatch, which the job takes over.

    Not of another job that this one is submitted from; and what was said on our command line holds. Where
    the environment of lockstep is not activated, its programs are put on PATH.
    """
    said = {_VARIABLES[name] for name in _VARIABLES if getattr(options, name) is not None}
    kept = {
        name: value
        for name, value in env.items()
        if (not name.startswith("SLURM_") or name == "SLURM_CONF") and name not in {*_OURS, *said}
    }
    ours = Path(sys.executable).parent
    path = env.get("PATH", os.defpath)
    if (ours / "lockstep").exists() and shutil.which("lockstep", path=path) != str(ours / "lockstep"):
        kept["PATH"] = f"{ours}{os.pathsep}{path}"
    return kept


def _first_words(options: Options, words: Sequence[str]) -> list[str]:
    """The arguments as the first task of an array has them, for reading."""
    first = re.match("[0-9]+", options.array or "")
    return [word.replace(TASK, first[0]) for word in words] if first else list(words)


def _check_run(options: Options, request: Request, words: Sequence[str]) -> None:
    """USAGE where tasks of an array would meet in one run, or where it is open which run is meant."""
    directory = run_directory(request, {"SLURM_JOB_ID": "0"})
    if options.array is not None and options.follow is not None:
        raise UserError(
            f"--array {options.array} --follow: there is more than one job to follow",
            mend="submit them, then follow one: lockstep launch --slurm --follow JOB_TASK",
            code="USAGE",
        )
    if options.array is None or any(TASK in word for word in words):
        return
    in_turns = options.array.endswith("%1")
    if request.mode == "train" and request.flags.run_dir is not None and not in_turns:
        raise UserError(
            f"--array {options.array} --run-dir {directory}: all tasks would train one run at the same time",
            mend=f"--run-dir {directory}-{TASK} for one run each; %1 at the end of --array for one by one",
            code="USAGE",
        )


def _follow_only(options: Options, words: Sequence[str]) -> int:
    if words:
        raise UserError(
            f"--follow {options.follow} shows a job that is there; {shlex.join(words)[:80]} is for a new one",
            mend="--follow without a number submits and then shows the new job",
            code="USAGE",
        )
    if options != replace(Options(slurm=True), follow=options.follow, job_name=options.job_name):
        raise UserError(
            "--follow without arguments behind -- shows a job that is there, and takes --job-name at most",
            mend="to submit and follow: lockstep launch --slurm ... --follow -- train ...",
            code="USAGE",
        )
    return follow(options.follow or newest_job(options.job_name), tail=True)


def _tell(options: Options, request: Request, name: str, job: str) -> None:
    """What was submitted, where it is, and how to watch, stop and continue it."""
    first = re.match("[0-9]+", options.array or "")
    ids = {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": first[0]} if first else {"SLURM_JOB_ID": job}
    one = job_name_of(ids)
    record = _accepted(job, one)
    directory = run_directory(request, ids)
    log = record.output if record and record.output else f"{name}-{one}.out"
    of_first = f"  (task {first[0]}; the others likewise)" if first else ""
    say(f"job {job}: {name}, {_size(options)}, at most {options.time or TIME}")
    say(f"  run      {directory}{of_first}")
    say(f"  log      {log}")
    say(f"  watch    lockstep launch --slurm --follow {one}")
    if request.mode != "train":
        say(f"  stop     scancel {job}")
        return
    say(f"  stop     scancel {job}  (it saves first, and is not queued again)")
    say(f"  go on    the same command with --run-dir {shlex.quote(str(directory))}")


def _accepted(job: str, one: str) -> Record | None:
    """What SLURM says of the new job; USAGE, and the job is withdrawn, where it would wait for ever.

    sbatch --test-only is no help: it refuses what waits for a node that is down, and takes a limit too long.
    """
    end = time.monotonic() + JUDGED
    record = record_of(one)
    while record is not None and record.words() == "PENDING" and time.monotonic() < end:
        time.sleep(LOOK)
        record = record_of(one)
    if record is not None and record.state == "PENDING" and record.reason in NEVER:
        ask(["scancel", job])
        raise UserError(
            f"SLURM would never start this: {record.reason} (job {job} is withdrawn)",
            mend="sinfo lists partitions, their nodes and limits",
            code="USAGE",
        )
    return record


def _size(options: Options) -> str:
    least = f"{options.least_nodes} to " if options.least_nodes < options.nodes else ""
    nodes = f"{least}{counted(options.nodes, 'node')}"
    if options.gpus:
        return f"{nodes} with {counted(options.gpus, 'GPU')} each"
    return f"{nodes} with {counted(options.processes_per_node or 1, 'process', 'processes')} each"
