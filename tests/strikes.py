"""Signals that strike jobs of two processes while they train, several jobs at once, and how those end."""

from __future__ import annotations

import os
import signal
import sys
import time
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM, SIGUSR1
from types import MappingProxyType
from typing import NamedTuple

from tests.marked_processes import DEADLINE, living, wait_until
from tests.real_jobs import EVERY, READY, STEPS, begin, check_same, clear_away, failure, last_step, ranks
from training.checkpoints.protocol import newest_verified, step_of

PACE = 0.2  # seconds that a step takes longer
AT_ONCE = 6  # jobs
STOPS_WITHIN, ENDS_WITHIN = 20.0, 5.0  # seconds from a request to stop, and from a kill
SLACK = 8.0  # seconds that the launcher of others may take for its own end on a busy machine


class Case(NamedTuple):
    """A signal to a process of a job: "launcher", "rank 0" or "rank 1"."""

    victim: str
    sign: signal.Signals

    @property
    def name(self):
        return f"{self.victim}-{self.sign.name}".replace(" ", "-")


class Outcome(NamedTuple):
    """The name in failure.json ("" where there is none), and the launcher's exit code."""

    name: str
    code: int


FINISHED = Outcome("", 0)  # what a job comes to that hears of no signal
CASES = [
    *(Case("launcher", sign) for sign in (SIGKILL, SIGTERM, SIGINT, SIGUSR1, SIGHUP)),
    *(Case("rank 1", sign) for sign in (SIGKILL, SIGTERM, SIGINT, SIGUSR1)),
    Case("rank 0", SIGKILL),
]
MORE_CASES = [Case("rank 1", SIGHUP), Case("rank 0", SIGUSR1)]
AGAIN = [Case("launcher", SIGKILL), Case("rank 1", SIGTERM)]  # those that are started again


class Launcher(NamedTuple):
    """What starts a job of two processes on one machine, and how that ends where it has its own ways."""

    name: str
    command: list
    stopped: int  # its exit code where the job stopped
    crashed: int
    own: MappingProxyType = MappingProxyType({})  # Outcome by Case, where it is not what one would think
    cases: list = CASES
    env: MappingProxyType = MappingProxyType({})

    def begin(self, folder, **keywords):
        return begin(self.command, folder, env=dict(self.env), **keywords)

    def expected(self, case):
        """A process that is killed is a crash; any other signal, and the launcher's death, asks to stop."""
        if case in self.own:
            return self.own[case]
        if case.sign != SIGKILL:
            return Outcome("STOPPED", self.stopped)
        launcher = case.victim == "launcher"
        return Outcome("STOPPED", -SIGKILL) if launcher else Outcome("CRASH", self.crashed)


class End(NamedTuple):
    """How a job ended, and what else there is to see."""

    outcome: Outcome
    said: dict
    seconds: float  # from the signal to the end of the last process
    checkpoint: int  # the newest that verifies, 0: none
    step: int  # the last in metrics.jsonl
    left: int  # processes 5 seconds after the launcher's end


def check(launcher, digits, folder):
    """Strike jobs of a launcher in every way, print how they end, and see that they end as they must.

    The jobs by case; each has a folder of its own.
    """
    jobs, ends = {}, {}
    for first in range(0, len(launcher.cases), AT_ONCE):
        some = launcher.cases[first : first + AT_ONCE]
        jobs |= (
            begun := {case: launcher.begin(folder / case.name, digits=digits, pace=PACE) for case in some}
        )
        ends |= _strike(begun)
    table = _table(launcher.name, ends)
    sys.stdout.write(f"\n{table}\n")
    said = table + "".join(f"\n{case}\n{job.text()}" for case, job in jobs.items())
    assert {case: end.outcome for case, end in ends.items()} == {
        case: launcher.expected(case) for case in ends
    }, said
    for case, end in ends.items():
        assert _is_in_order(case, end), f"{case}: {end}\n{said}"
        assert jobs[case].text().count("FATAL ") <= 1, said
    return jobs


def go_on(launcher, jobs, digits, whole):
    """Start some of these jobs again: they end as the run that nothing has disturbed did."""
    again = {case: launcher.begin(jobs[case].folder, digits=digits, name="again") for case in AGAIN}
    try:
        for case, job in again.items():
            assert job.process.wait(timeout=DEADLINE) == 0, f"{case}: {job.text()}"
            check_same(job.run_dir, whole)
    finally:
        for job in again.values():
            clear_away(job)


def _is_in_order(case, end):
    """Nobody is left, in time; the checkpoint is of the very step after which all have stopped."""
    if end.outcome == FINISHED:
        return end.left == 0 and end.checkpoint == end.step == STEPS
    soon = end.left == 0 and end.seconds < (ENDS_WITHIN + SLACK if case.sign == SIGKILL else STOPS_WITHIN)
    if end.outcome.name == "STOPPED":
        return soon and READY <= end.checkpoint == end.step < STEPS
    named = end.outcome.name != "CRASH" or (
        f"rank {end.said['rank']}" == case.victim and "was killed by signal 9 (SIGKILL)" in end.said["what"]
    )
    return soon and named and EVERY <= end.checkpoint <= end.step < STEPS


def _strike(jobs):
    """Strike the jobs once all of them train; how each ended."""
    try:
        for case, job in jobs.items():
            ready = wait_until(lambda job=job: last_step(job.run_dir) >= READY or job.process.poll())
            assert ready is True, f"{case}: {job.text()}"
        struck = {}
        for case, job in jobs.items():
            victim = job.process.pid if case.victim == "launcher" else ranks(job)[int(case.victim[-1])]
            struck[case] = time.time()
            os.kill(victim, case.sign)
        over = _ends(jobs)
        return {case: _end(job, over[case] - struck[case]) for case, job in jobs.items()}
    finally:
        for job in jobs.values():
            clear_away(job)


def _ends(jobs):
    """When nothing was left of each: 5 seconds after its launcher's end at most."""
    launchers, over, end = {}, {}, time.time() + DEADLINE
    while len(over) < len(jobs) and time.time() < end:
        for case, job in jobs.items():
            now = time.time()
            if case not in launchers and job.process.poll() is not None:
                launchers[case] = now
            if case in launchers and case not in over and (not living(job.mark) or now > launchers[case] + 5):
                over[case] = now
        time.sleep(0.05)
    assert len(over) == len(jobs), "\n".join(f"{case}: {jobs[case].text()}" for case in jobs.keys() - over)
    return over


def _end(job, seconds):
    said = failure(job.run_dir)
    checkpoint = newest_verified(job.run_dir / "checkpoints", say=lambda text: None)
    return End(
        Outcome(said.get("code", ""), job.process.returncode),
        said,
        seconds,
        0 if checkpoint is None else step_of(checkpoint),
        last_step(job.run_dir),
        len(living(job.mark)),
    )


def _table(launcher, ends):
    """The ends as lines for a person."""
    lines = [f"{launcher:<11} to        signal   outcome  exit  seconds  checkpoint  of step  left"]
    for (victim, sign), end in ends.items():
        name, code = end.outcome
        what = f"{'':<11} {victim:<9} {sign.name:<8} {name or '-':<8} {code:>4}  {end.seconds:>7.1f}"
        lines.append(f"{what}  {end.checkpoint:>10}  {end.step:>7}  {end.left:>4}")
    return "\n".join(lines)
