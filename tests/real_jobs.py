"""Jobs of real processes that train slowly enough to be met in the middle of a step, and what they leave."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.marked_processes import DEADLINE, MARK, living

ROOT = Path(__file__).parent.parent
RUN = ROOT / "training" / "run.py"
BIN = Path(sys.executable).parent
STEPS, EVERY = 40, 5  # steps in all, steps between checkpoints
READY = EVERY + 1  # the step from which on a job is slow
EXACT = ["--train.exact", "true"]  # the same bits on any number of processes

# Python runs sitecustomize.py in every process. Here it makes steps longer: in exact mode the share of every
# grain. A restart is quick again.
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

first = os.environ.get("LOCKSTEP_START", "0") == "0"
if "PACE" in os.environ and first and "training/run.py" in " ".join(sys.orig_argv):
    threading.Thread(target=slow_down, daemon=True).start()
"""


class Job(NamedTuple):
    """A job under way, or the part of it that runs on one host."""

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


def begin(command, folder, *, digits, pace=None, more=(), under=(), name="job", mark=None, env=None):
    """Start a job, or the part of it that belongs on one host, which `under` leads to."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "sitecustomize.py").write_text(SLOWLY)
    flags = ["--run-dir", "run", "--data.root", digits, "--data.workers", 1, "--model.name", "test_resnet"]
    flags += ["--train.max-steps", STEPS, "--checkpoint.every-steps", EVERY, "--debug.batch-digest", "keys"]
    mark = mark or uuid.uuid4().hex
    # Nothing of this machine's set-up.
    known = {key: os.environ[key] for key in ("HOME", "TMPDIR", "LANG") if key in os.environ}
    clean = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "hf"), MARK: mark}
    own = {"PYTHONPATH": str(folder), "ACCELERATE_USE_CPU": "true", "PATH": f"{BIN}:{os.environ['PATH']}"}
    own |= {} if pace is None else {"PACE": str(pace)}
    process = subprocess.Popen(
        [str(word) for word in [*under, *command, *flags, *more]],
        cwd=folder,
        env=known | clean | own | (env or {}),
        stdin=subprocess.DEVNULL,
        stdout=(folder / f"{name}.out").open("wb"),
        stderr=(folder / f"{name}.err").open("wb"),
        start_new_session=True,
    )
    return Job(process, mark, folder, name)


def clear_away(job):
    """End whatever is left of a job."""
    for number in living(job.mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    job.process.wait()


def undisturbed(command, folder, *, digits, **keywords):
    """The directory of a run to its end."""
    job = begin(command, folder, digits=digits, **keywords)
    try:
        assert job.process.wait(timeout=DEADLINE) == 0, job.text()
    finally:
        clear_away(job)
    return job.run_dir


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
    """The launcher's process, where other programs lead to it."""
    first = psutil.Process(job.process.pid)
    return next(one for one in [first, *first.children(recursive=True)] if "python" in one.cmdline()[0])


def failure(run_dir):
    """What failure.json says, nothing where there is none."""
    told = run_dir / "failure.json"
    return json.loads(told.read_text()) if told.exists() else {}


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


def check_same(run_dir, whole):
    """Every step once, and in the end the same bits as the run that nothing disturbed."""
    assert [one["step"] for one in records(run_dir)] == list(range(1, STEPS + 1))
    assert _results(run_dir) == _results(whole)
    assert _weights(run_dir) == _weights(whole)
    assert not (run_dir / "failure.json").exists()


def _results(run_dir):
    """Every step and every evaluation but for the clock."""
    found = [*records(run_dir, "train"), *records(run_dir, "eval")]
    return [{name: value for name, value in one.items() if name != "seconds"} for one in found]


def _weights(run_dir):
    return hashlib.sha256((run_dir / "weights" / "last.safetensors").read_bytes()).hexdigest()
