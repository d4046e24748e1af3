"""Jobs of two processes that a signal strikes while they train, several at once, and how they end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM, SIGUSR1
from typing import NamedTuple

import psutil

from tests.marked_processes import DEADLINE, MARK, living, wait_until
from training.checkpoints.protocol import newest_verified, step_of

ROOT = Path(__file__).parent.parent
RUN = ROOT / "training" / "run.py"
BIN = Path(sys.executable).parent
STEPS, EVERY = 40, 5  # steps in all, steps between checkpoints
READY = EVERY + 1  # the step from which on a job is slow, and may be struck
AT_ONCE = 6  # jobs
ENDS_WITHIN = 5.0  # seconds
SLACK = 5.0  # seconds that a busy machine may take longer

# Python runs sitecustomize.py in every process. Here it makes steps long enough to be struck in their middle.
SLOWLY = f"""
import os, sys, threading, time

def slow_down():
    while not hasattr(sys.modules.get("training.loop"), "train"):
        time.sleep(0.01)
    modules = [sys.modules[name] for name in ("training.gradients", "training.exact.grains")]
    plain = modules[0].sums_of
    def sums_of(job, *rest, **keywords):
        time.sleep(float(os.environ["PACE"]) if job.place.done >= {READY} else 0)
        return plain(job, *rest, **keywords)
    for module in modules:
        module.sums_of = sums_of

if "PACE" in os.environ and "training/run.py" in " ".join(sys.orig_argv):
    threading.Thread(target=slow_down, daemon=True).start()
"""


class Case(NamedTuple):
    """A signal to a process of a job: "launcher", "rank 0" or "rank 1"."""

    victim: str
    sign: signal.Signals


CASES = [
    *(Case("launcher", sign) for sign in (SIGKILL, SIGTERM, SIGINT, SIGUSR1, SIGHUP)),
    *(Case("rank 1", sign) for sign in (SIGKILL, SIGTERM, SIGINT, SIGUSR1, SIGHUP)),
    *(Case("rank 0", sign) for sign in (SIGKILL, SIGUSR1)),
]
AGAIN = [Case("launcher", SIGKILL), Case("rank 0", SIGKILL), Case("rank 1", SIGTERM)]  # those that go on


class Outcome(NamedTuple):
    """How a job ended: the name in failure.json ("" where nobody wrote one), and the launcher's exit code."""

    name: str
    code: int


class Launcher(NamedTuple):
    """What starts a job of two processes on one machine, and its exit codes where it has its own."""

    name: str
    command: list
    stopped: int
    crashed: int
    own: dict  # Outcome by Case, where it is not what the name of the case says

    def expected(self, case):
        """Who is asked to stop stops the job; a process that is killed is a crash; ties end the rest."""
        if case in self.own:
            return self.own[case]
        if case.sign == SIGKILL:
            return (
                Outcome("STOPPED", -SIGKILL) if case.victim == "launcher" else Outcome("CRASH", self.crashed)
            )
        return Outcome("STOPPED", self.stopped)


class End(NamedTuple):
    """How a job ended, and what else there is to see."""

    outcome: Outcome
    said: dict
    seconds: float  # from the signal to the end of the last process
    checkpoint: int  # the newest that verifies, 0: none
    step: int  # the last in metrics.jsonl
    left: int  # processes 5 seconds after the launcher's end


class Job(NamedTuple):
    """A job under way."""

    process: subprocess.Popen
    mark: str
    folder: Path
    name: str

    @property
    def run_dir(self):
        return self.folder / "run"

    def text(self):
        """What it has said, for whoever wants to know why a test fails."""
        ends = [self.folder / f"{self.name}.{end}" for end in ("out", "err")]
        return "".join(end.read_text(errors="replace") for end in ends)


def environment(folder, mark, *, pace=None):
    """What the processes of a job know: nothing of this machine's set-up."""
    known = {key: os.environ[key] for key in ("HOME", "TMPDIR", "LANG", "SLURM_CONF") if key in os.environ}
    clean = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "hf"), MARK: mark}
    own = {"PYTHONPATH": str(folder), "ACCELERATE_USE_CPU": "true", "PATH": f"{BIN}:{os.environ['PATH']}"}
    return known | clean | own | ({} if pace is None else {"PACE": str(pace)})


def begin(command, folder, *, digits, pace=None, more=(), under=(), name="job", mark=None):
    """Start a job, or the part of it that belongs on one host, which `under` leads to."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "sitecustomize.py").write_text(SLOWLY)
    flags = ["--run-dir", "run", "--data.root", digits, "--data.workers", 1, "--model.name", "test_resnet"]
    flags += ["--train.max-steps", STEPS, "--checkpoint.every-steps", EVERY, "--debug.batch-digest", "keys"]
    mark = mark or uuid.uuid4().hex
    process = subprocess.Popen(
        [str(word) for word in [*under, *command, *flags, *more]],
        cwd=folder,
        env=environment(folder, mark, pace=pace),
        stdin=subprocess.DEVNULL,
        stdout=(folder / f"{name}.out").open("wb"),
        stderr=(folder / f"{name}.err").open("wb"),
        start_new_session=True,
    )
    return Job(process, mark, folder, name)


def ranks(job):
    """The number of each process that trains, by rank."""
    found = {}
    for number in living(job.mark):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
            lines = Path(f"/proc/{number}/environ").read_bytes().decode(errors="replace").split("\0")
            parent = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1]
            variables = dict(line.partition("=")[::2] for line in lines)
            rank = variables.get("RANK", variables.get("SLURM_PROCID"))
            if str(RUN).encode() in words[1:3] and rank is not None:  # torchrun says python -u
                found[number] = int(parent), int(rank)
    # Readers are forked: they look like their parents.
    return {rank: number for number, (parent, rank) in found.items() if parent not in found}


def launcher_in(job):
    """The launcher's process, where another program leads to it."""
    inside = [psutil.Process(job.process.pid), *psutil.Process(job.process.pid).children(recursive=True)]
    return next(one for one in inside if "python" in one.cmdline()[0])


def records(run_dir, kind="train"):
    """Whole lines of metrics.jsonl."""
    try:
        text = (run_dir / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    whole = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [one for one in whole if one["kind"] == kind]


def last_step(run_dir):
    return max((one["step"] for one in records(run_dir)), default=0)


def strike(jobs):
    """Strike the jobs ({case: job}) once all of them train; how each ended."""
    try:
        for case, job in jobs.items():
            ready = wait_until(lambda job=job: last_step(job.run_dir) >= READY or job.process.poll())
            assert ready is True, f"{case}: {job.text()}"
        struck = {case: _strike(job, case) for case, job in jobs.items()}
        over = _ends(jobs)
        return {case: _ended(job, struck[case], over[case]) for case, job in jobs.items()}
    finally:
        for job in jobs.values():
            clear_away(job)


def _strike(job, case):
    victim = job.process.pid if case.victim == "launcher" else ranks(job)[int(case.victim[-1])]
    os.kill(victim, case.sign)
    return time.time()


def _ends(jobs):
    """When the launcher of each had ended, and when there was nothing left of it: 5 seconds later at most."""
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


def clear_away(job):
    """End whatever is left of a job."""
    for number in living(job.mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    job.process.wait()


def _ended(job, struck, over):
    told = job.run_dir / "failure.json"
    said = json.loads(told.read_text()) if told.exists() else {}
    checkpoint = newest_verified(job.run_dir / "checkpoints", say=lambda text: None)
    return End(
        Outcome(said.get("code", ""), job.process.returncode),
        said,
        over - struck,
        0 if checkpoint is None else step_of(checkpoint),
        last_step(job.run_dir),
        len(living(job.mark)),
    )


def check(launcher, digits, folder):
    """Strike jobs of a launcher in every way, print how they end, and see that they end as they must."""
    jobs, ends = {}, {}
    for first in range(0, len(CASES), AT_ONCE):
        jobs |= (
            some := {
                case: begin(launcher.command, folder / _name(case), digits=digits, pace=0.2)
                for case in CASES[first : first + AT_ONCE]
            }
        )
        ends |= strike(some)
    lines = table(launcher.name, ends)
    sys.stdout.write(f"\n{lines}\n")
    said = lines + "".join(f"\n{case}\n{job.text()}" for case, job in jobs.items())
    assert {case: end.outcome for case, end in ends.items()} == {
        case: launcher.expected(case) for case in ends
    }, said
    for case, end in ends.items():
        assert end.left == 0, said
        assert end.seconds < ENDS_WITHIN + SLACK, said
        if end.outcome.name == "STOPPED":
            # The checkpoint is of the very step after which all have stopped.
            assert READY <= end.checkpoint == end.step < STEPS, said
        else:
            assert EVERY <= end.checkpoint <= end.step < STEPS, said
        if end.outcome.name == "CRASH":
            assert f"rank {end.said['rank']}" == case.victim, said
            assert "was killed by signal 9 (SIGKILL)" in end.said["what"], said
        assert jobs[case].text().count("FATAL ") <= 1, said
    return jobs


def go_on(launcher, jobs, digits, whole):
    """Start some of these jobs again: they end as the run that nothing has disturbed did."""
    again = {case: begin(launcher.command, jobs[case].folder, digits=digits, name="again") for case in AGAIN}
    try:
        for case, job in again.items():
            assert job.process.wait(timeout=DEADLINE) == 0, f"{case}: {job.text()}"
            assert [one["step"] for one in records(job.run_dir)] == list(range(1, STEPS + 1))
            assert results(job.run_dir) == results(whole)
            assert weights(job.run_dir) == weights(whole)
            assert not (job.run_dir / "failure.json").exists()
    finally:
        for job in again.values():
            clear_away(job)


def undisturbed(launcher, digits, folder):
    """The directory of a run to its end."""
    job = begin(launcher.command, folder, digits=digits)
    try:
        assert job.process.wait(timeout=DEADLINE) == 0, job.text()
    finally:
        clear_away(job)
    return job.run_dir


def results(run_dir):
    """Every step's batch, loss and the like, and every evaluation: what a kill and a start must not change."""
    found = [*records(run_dir, "train"), *records(run_dir, "eval")]
    return [{name: value for name, value in one.items() if name != "seconds"} for one in found]


def weights(run_dir):
    """The last ones' SHA-256."""
    return hashlib.sha256((run_dir / "weights" / "last.safetensors").read_bytes()).hexdigest()


def _name(case):
    return f"{case.victim}-{case.sign.name}".replace(" ", "-")


def table(launcher, ends):
    """The ends as lines for a person."""
    head = f"{launcher:<12} {'to':<9} {'signal':<8} {'outcome':<11} exit  seconds  checkpoint  of step  left"
    lines = [head]
    for (victim, sign), end in ends.items():
        name, code = end.outcome
        what = f"{'':<12} {victim:<9} {sign.name:<8} {name or '-':<11} {code:>4}  {end.seconds:>7.1f}"
        lines.append(f"{what}  {end.checkpoint:>10}  {end.step:>7}  {end.left:>4}")
    return "\n".join(lines)
