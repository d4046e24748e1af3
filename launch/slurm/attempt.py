"""One start of the processes of a SLURM job: what is run, in which environment, and how it ended."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.command_line import say
from launch.attempts import NO_PROGRESS, Outcome, failure_of, stamp_of, words_again
from launch.command import Command, srun_command
from launch.options import Options
from launch.slurm import scontrol
from launch.slurm.lead import Lead, save_seconds, warning
from launch.slurm.outcome import outcome_of
from launch.slurm.step import Inbox, Told, run_step
from launch.topology import PROCESS_VARIABLES, Topology
from training.command import Request
from training.vigil.ending import Failure, speak

PROGRAM = Path(__file__).parents[2] / "training" / "run.py"
LOOK = 10.0  # seconds between looks at how long saving takes
WAIT = 120.0  # seconds for all processes to come: nodes of a large job do not start at once


@dataclass(frozen=True)
class Job:
    """What is the same for all starts of one job."""

    options: Options
    request: Request
    words: Sequence[str]
    name: str
    """as scontrol knows it: JOB or ARRAY_TASK"""
    restarts: int
    """how often SLURM has started this job before"""
    topology: Topology
    run_dir: Path

    @property
    def saves(self) -> bool:
        """Whether there is something to save when it is asked to stop."""
        return self.request.mode == "train"


def start_processes(
    job: Job, words: Sequence[str], inbox: Inbox, told: Told, lead: Lead, *, number: int
) -> tuple[Outcome, bool]:
    """One srun; how it ended, and whether a node was lost."""
    since = stamp_of(job.run_dir)
    token = secrets.token_hex(16)
    step = f"lockstep-{token[:8]}"
    command = command_of(job, words, step)
    say(command.text())
    warned = _Warned(job, lead)
    env = _environment(os.environ, job) | {"LOCKSTEP_TOKEN": token, "LOCKSTEP_START": str(number)}
    end = run_step(
        command,
        env,
        inbox,
        told,
        saves=job.saves,
        spoke=lambda: failure_of(job.run_dir, since) is not None,
        look=warned.look,
    )
    failure = failure_of(job.run_dir, since)
    outcome = outcome_of(end, failure, told, saves=job.saves)
    if end.returncode < 0:
        scontrol.end_steps(job.name, step)
    if failure is None and outcome.name in ("CRASH", "STOPPED"):
        _speak(job, outcome.name, outcome.what)
    return outcome, end.node_lost


def command_of(job: Job, words: Sequence[str], step: str) -> Command:
    own = [*words]
    if job.saves and job.request.flags.run_dir is None:
        own += ["--run-dir", str(job.run_dir)]
    if job.request.flags.expect_processes is None:
        own += ["--expect-processes", str(job.topology.world)]
    command = srun_command(job.topology, str(PROGRAM), own)
    return replace(command, argv=(command.argv[0], f"--job-name={step}", *command.argv[1:]))


def _environment(env: Mapping[str, str], job: Job) -> dict[str, str]:
    """What srun hands on: nothing of another launcher around this job, or all would believe to be one."""
    others = {*PROCESS_VARIABLES, "LOCKSTEP_LAUNCHER", "LOCKSTEP_LISTENER"}
    own = {name: value for name, value in env.items() if name not in others}
    own |= {"ACCELERATE_USE_CPU": env["ACCELERATE_USE_CPU"]} if "ACCELERATE_USE_CPU" in env else {}
    wait = max(WAIT, job.options.wait)
    # Where they meet is theirs to find: the port follows from the numbers of job and step.
    return own | {"MASTER_ADDR": job.topology.address, "LOCKSTEP_WAIT": f"{wait:g}"}


def words_of(job: Job, *, again: bool) -> Sequence[str]:
    """The arguments of this start: --fresh moves a run aside once, not at each start of the job."""
    if not job.request.flags.fresh:
        return job.words
    # Goes aside together with the run.
    owed = job.run_dir / f".fresh-{job.name}"
    if not again and (job.run_dir / "config.yaml").exists():
        owed.touch()
    return words_again(job.words) if again and not owed.exists() else job.words


class _Warned:
    """Says once a start that the end of the time is announced too late, as soon as that is known."""

    def __init__(self, job: Job, lead: Lead) -> None:
        self._job, self._lead, self._done = job, lead, not job.saves
        self._due = 0.0  # time.monotonic() of the next look

    def look(self) -> None:
        """Compare what is known by now, once in a while."""
        if self._done or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + LOOK
        if text := warning(self._lead, save_seconds(self._job.run_dir)):
            self._done = True
            speak(f"warning: {text}")


def say_no_progress(job: Job) -> None:
    what = f"error: {NO_PROGRESS}: no checkpoint is newer than before them"
    hint = f"see why in the job's output; to try again, submit it with --run-dir {job.run_dir.absolute()}"
    _speak(job, "CRASH", what, hint, replace=True)


def _speak(
    job: Job, name: str, what: str, hint: str = "start the same again to go on", *, replace: bool = False
) -> None:
    """Write failure.json and the last line, for processes that cannot."""
    failure = Failure(name, 0, socket.gethostname(), what, hint)
    if failure.write(job.run_dir, first=not replace):
        speak(f"{what}\n{failure.line()}")
