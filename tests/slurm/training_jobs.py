"""Training as a job of SLURM: submitted, met at a step, waited for, and compared with a run of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.slurm.cluster import WITHIN, Cluster

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "slurm" / "train.sbatch"
STEPS, EPOCH, EVERY = 26, 22, 4  # of each run: steps in all, steps an epoch, steps between checkpoints
GONE = 5  # seconds after the end of a job in which the last of its processes goes

# Python runs sitecustomize.py in every process: the first start of a job is slow where SLOW_STEPS says so.
PACE = """
import os, sys, threading, time

def slow_down(seconds):
    while not hasattr(sys.modules.get("training.loop"), "train"):
        time.sleep(0.01)
    loop = sys.modules["training.loop"]
    plain = loop.take_step
    def take_step(*words, **keywords):
        time.sleep(seconds)
        return plain(*words, **keywords)
    loop.take_step = take_step

ranks = "training/run.py" in " ".join(sys.orig_argv)
if ranks and "SLOW_STEPS" in os.environ and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    threading.Thread(target=slow_down, args=(float(os.environ["SLOW_STEPS"]),), daemon=True).start()
"""


def flags(digits):
    """What all runs have in common: the same bits, whoever computes them."""
    values = {
        "--data.root": digits,
        "--data.workers": 0,
        "--model.name": "test_resnet",
        "--train.exact": "true",
        "--train.max-steps": STEPS,
        "--checkpoint.every-steps": EVERY,
        "--debug.batch-digest": "pixels",
    }
    return [str(word) for pair in values.items() for word in pair]


def records(run_dir, kind=None):
    """The whole lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [one for one in whole if kind in (None, one["kind"])]


def last_step(run_dir):
    """The newest step in the records, 0 where there is none."""
    return max((one["step"] for one in records(run_dir, "train")), default=0)


def learned(run_dir):
    """The records of steps and evaluations but for seconds, and the SHA-256 of what was learned."""
    told = [one for one in records(run_dir) if one["kind"] != "start"]
    told = [{name: value for name, value in one.items() if name != "seconds"} for one in told]
    end = run_dir / "checkpoints" / f"step-{STEPS:08d}"
    files = [end / f"{name}.safetensors" for name in ("model", "optimizer")]
    return told, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


@dataclass(frozen=True)
class TrainingJob:
    """A job, or an array's task, that trains."""

    cluster: Cluster
    number: str  # 1002, or 1002_1
    run_dir: Path

    @property
    def log(self):
        """What all of its starts have said."""
        return self.cluster.log(self.number)

    @property
    def info(self):
        """What SLURM knows of it."""
        return self.cluster.info(self.number)

    @property
    def failure(self):
        """What failure.json says."""
        return json.loads((self.run_dir / "failure.json").read_text())

    def task(self, number):
        """One of the tasks of this array."""
        name = f"{self.number}_{number}"
        return TrainingJob(self.cluster, name, self.run_dir.parent / f"digits-{name}")

    def reach(self, step):
        """Wait until that step is in the records, and the job has more to do."""
        self.until(lambda: last_step(self.run_dir) >= step)
        assert last_step(self.run_dir) < STEPS, "too fast to be met"
        return self

    def until(self, look):
        """Wait for a truthy answer."""
        return self.cluster.wait_for(look, self.number)

    def say(self, *words):
        """A command of SLURM about this job."""
        return self.cluster.call(*words, self.number)

    def ends(self, state="COMPLETED", code=0, *, restarts=0, within=WITHIN):
        """The job ends so, after as many requeues, and nothing of it is left on any node."""
        info = self.cluster.wait(self.number, within=within)
        found = (info["JobState"], info["ExitCode"], info["Restarts"])
        assert found == (state, f"{code}:0", str(restarts)), f"{info}\n{self.log[-5000:]}"
        self.leaves_nothing()
        return self

    def leaves_nothing(self):
        """No process of this job lives on."""
        end = time.monotonic() + GONE
        while left := self.cluster.processes(self.number):
            assert time.monotonic() < end, [Path(f"/proc/{one}/cmdline").read_bytes() for one in left]
            time.sleep(0.1)

    def rank(self, number):
        """The process with that rank."""
        return min(one for one in self.processes("training/run.py") if _says(one, f"SLURM_PROCID={number}"))

    def processes(self, words):
        """Those with `words` on their command line."""
        found = []
        for number in self.cluster.processes(self.number):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                found += [number] if words in line else []
        return found

    def went_on(self, whole, *, processes):
        """All is as in the run that nothing disturbed, though `processes` lists several starts."""
        starts = records(self.run_dir, "start")
        assert [one["processes"] for one in starts] == list(processes), self.log[-5000:]
        for before, after in pairwise(starts):
            assert before["step"] < after["step"] == int(after["resumed_from"][-8:]), starts
        assert learned(self.run_dir) == learned(whole)
        assert [one["step"] for one in records(self.run_dir, "train")] == list(range(1, STEPS + 1))


def _says(number, setting):
    return setting.encode() in Path(f"/proc/{number}/environ").read_bytes().split(b"\0")


@dataclass(frozen=True)
class Submitter:
    """Submits training from a folder, as its user would."""

    cluster: Cluster
    folder: Path
    common: tuple[str, ...]

    def __call__(self, *words, nodes="2", tasks="1", options=(), slow=0.0, run_dir=None):
        """Submit slurm/train.sbatch: `tasks` processes a node, `slow` seconds more a step at first."""
        (self.folder / "sitecustomize.py").write_text(PACE)
        env = {"PYTHONPATH": self.folder} | ({"SLOW_STEPS": slow} if slow else {})
        said = ["--run-dir", run_dir] if run_dir else []
        number = self.cluster.submit(
            *[*self.common, *words, *said],
            script=SCRIPT,
            options=[f"--nodes={nodes}", f"--ntasks-per-node={tasks}", *options],
            env=env,
            cwd=self.folder,
        )
        return TrainingJob(self.cluster, number, self.folder / (run_dir or f"runs/digits-{number}"))


def last_word(text):
    """The code of the last FATAL line; empty where there is none."""
    return (re.findall(r"^FATAL code=(\w+)", text, re.MULTILINE) or [""])[-1]
