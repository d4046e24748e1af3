"""What runs inside of a SLURM job, with programs in the place of SLURM's; tests/slurm has the real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
JOB = {
    "SLURM_JOB_ID": "41",
    "SLURM_JOB_NODELIST": "localhost",
    "SLURM_JOB_CPUS_PER_NODE": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_TASK_PID": "1",
}
STOPPED = {"code": "STOPPED", "rank": 0, "host": "n1", "what": "stopped", "hint": "again", "step": 3}

# In srun's place: does what each line of ACTS says, one line a start.
SRUN = """#!{python}
import json, os, pathlib, signal, sys, time
here = pathlib.Path({here!r})
calls = here / "srun.jsonl"
number = len(calls.read_text().splitlines()) if calls.exists() else 0
act = os.environ["ACTS"].split(",")[number]
run = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1]) if "--run-dir" in sys.argv else here
heard = []
for sign in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(sign, lambda number, _: heard.append(number))
names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCKSTEP_TOKEN", "LOCKSTEP_START", "LOCKSTEP_WAIT")
with calls.open("a") as file:
    file.write(json.dumps([sys.argv[1:], {{name: os.environ.get(name) for name in names}}]) + "\\n")

def step(number):
    folder = run / "checkpoints" / f"step-{{number:08d}}"
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").touch()

if act == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if act.startswith("exit"):
    sys.exit(int(act[4:]))
while not heard or (act == "stubborn" and heard[-1] == signal.SIGUSR1):
    time.sleep(0.01)
if act == "save":
    step(number + 1)
if act in ("save", "stop") and heard[0] == signal.SIGUSR1:
    (run / "failure.json").write_text(json.dumps({stopped!r}))
    sys.exit(75)
sys.exit(128 + heard[0])
"""
# In scontrol's place: tells of a job that may be requeued, and notes what it was asked for.
SCONTROL = """#!{python}
import pathlib, sys
here = pathlib.Path({here!r})
with (here / "scontrol.txt").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if "show" in sys.argv:
    print((here / "job.txt").read_text())
if sys.argv[1] == "requeue" and (here / "denied").exists():
    sys.exit("Requested operation is presently disabled")
"""
FACTS = "JobId=41 JobState=RUNNING Requeue={requeue} BatchFlag={batch} EndTime=Unknown"


class Cluster:
    """One folder with the programs, and what they were called with."""

    def __init__(self, folder):
        self.folder = folder
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            path = folder / name
            path.write_text(text.format(python=sys.executable, here=str(folder), stopped=STOPPED))
            path.chmod(0o755)
        self.facts()

    def facts(self, *, requeue=1, batch=1):
        (self.folder / "job.txt").write_text(FACTS.format(requeue=requeue, batch=batch))

    def run(self, *words, acts="exit0", options=(), env=None, stop=None):
        """`lockstep launch` in the job; `stop`: signals to send once srun runs."""
        paths = f"{self.folder}{os.pathsep}/usr/bin{os.pathsep}/bin"
        own = {"PATH": paths, "PYTHONPATH": str(ROOT), "HOME": str(self.folder), "ACTS": acts}
        before = len(self.calls())
        job = subprocess.Popen(
            [sys.executable, "-m", "launch", "launch", *options, "--", *map(str, words)],
            env={**own, **JOB, **(env or {})},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in stop or ():
            end = time.monotonic() + 30
            while len(self.calls()) == before and job.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            job.send_signal(number)
            time.sleep(0.2)  # two of the same at once are one
        out, err = job.communicate(timeout=60)
        return job.returncode, out, err

    def calls(self):
        path = self.folder / "srun.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def requeued(self):
        path = self.folder / "scontrol.txt"
        asked = path.read_text().splitlines() if path.exists() else []
        return [line for line in asked if line.startswith("requeue")]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def test_a_job_that_is_told_of_the_end_of_its_time_saves_and_is_requeued(cluster):
    code, out, err = cluster.run("train", "--seed", 7, acts="save", stop=[signal.SIGUSR1])
    assert code == 75, err
    assert cluster.requeued() == ["requeue 41"]
    assert "job 41 is requeued" in out
    (argv, env), *others = cluster.calls()
    assert not others
    assert argv[-7:] == ["train", "--seed", "7", "--run-dir", "runs/digits-41", "--expect-processes", "2"]
    assert env["MASTER_ADDR"] == "localhost"
    assert (env["LOCKSTEP_START"], env["LOCKSTEP_WAIT"]) == ("0", "120")
    assert env["MASTER_PORT"] is None
    assert len(env["LOCKSTEP_TOKEN"]) == 32
    assert env["LOCKSTEP_TOKEN"] not in out + err


def test_after_sigterm_slurm_or_a_person_has_decided(cluster):
    code, out, err = cluster.run("train", acts="save", stop=[signal.SIGTERM])
    assert (code, cluster.requeued()) == (75, []), err
    assert "submit the same again with --run-dir" in out


@pytest.mark.parametrize(
    ("facts", "said"),
    [({"requeue": 0}, "--no-requeue"), ({"batch": 0}, "salloc"), (None, "presently disabled")],
)
def test_where_it_cannot_be_requeued_a_job_ends_with_75_and_says_how_to_go_on(cluster, facts, said):
    if facts is None:
        (cluster.folder / "denied").touch()
    cluster.facts(**(facts or {}))
    code, out, err = cluster.run("train", acts="save", stop=[signal.SIGUSR1])
    assert code == 75, err
    assert said in out
    assert f"submit the same again with --run-dir {cluster.folder / 'runs' / 'digits-41'}" in out


def test_without_scontrol_a_job_ends_with_75_and_says_how_to_go_on(cluster):
    (cluster.folder / "scontrol").unlink()
    code, out, err = cluster.run(
        "train", acts="save", stop=[signal.SIGUSR1], env={"PATH": str(cluster.folder)}
    )
    assert code == 75, err
    assert "scontrol is not on PATH: to go on, submit the same again" in out


def test_of_an_array_only_the_task_that_stopped_is_requeued(cluster):
    env = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2"}
    code, _, err = cluster.run("train", acts="save", stop=[signal.SIGUSR1], env=env)
    assert (code, cluster.requeued()) == (75, ["requeue 40_2"]), err
    assert (cluster.folder / "runs" / "digits-40_2" / "checkpoints").is_dir()


def test_a_signal_that_comes_before_the_processes_are_ready_loses_nothing(cluster):
    """Nobody but srun was there to hear it, and no process has written down why it ended."""
    code, _, err = cluster.run("train", acts="deaf", stop=[signal.SIGUSR1])
    assert (code, cluster.requeued()) == (75, ["requeue 41"]), err
    assert err.splitlines()[-1].startswith("FATAL code=STOPPED ")


@pytest.mark.slow
def test_three_starts_without_progress_are_enough_and_a_new_job_may_try_again(cluster):
    for number in range(2):
        env = {"SLURM_RESTART_COUNT": str(number)}
        code, _, err = cluster.run("train", acts="stop," * 3 + "stop", stop=[signal.SIGUSR1], env=env)
        assert (code, len(cluster.requeued())) == (75, number + 1), err
    code, _, err = cluster.run(
        "train", acts="stop,stop,stop", stop=[signal.SIGUSR1], env={"SLURM_RESTART_COUNT": "2"}
    )
    assert (code, len(cluster.requeued())) == (70, 2)
    assert "no progress in 3 starts" in err
    assert err.splitlines()[-1].startswith("FATAL code=CRASH rank=0 ")
    code, _, err = cluster.run("train", env={"SLURM_RESTART_COUNT": "3"})
    assert (code, len(cluster.calls())) == (70, 3), "SLURM has started it again: there is no srun"
    assert "no progress in 3 starts" in err
    run = cluster.folder / "runs" / "digits-41"
    assert json.loads((run / "failure.json").read_text())["code"] == "CRASH"
    code, _, err = cluster.run("train", "--run-dir", run, acts="stop,stop,stop,exit0")
    assert (code, len(cluster.calls())) == (0, 4), err


def test_a_killed_srun_is_a_crash_that_is_told_and_may_be_tried_again(cluster):
    code, _, err = cluster.run("train", acts="die")
    assert code == 70
    assert "srun was killed by signal 9 (SIGKILL)" in err
    assert err.splitlines()[-1].startswith("FATAL code=CRASH rank=0 ")
    assert cluster.requeued() == []
    code, out, err = cluster.run("train", acts="die,exit71,exit0", options=["--max-restarts", "1"])
    assert (code, len(cluster.calls())) == (0, 3), err
    assert "started again, 0 restarts are left" in out


@pytest.mark.parametrize("code", [0, 2, 70, 74, 76])
def test_other_ends_are_handed_on_and_nothing_is_requeued(code, cluster):
    assert cluster.run("train", acts=f"exit{code}")[0] == code
    assert cluster.requeued() == []


def test_the_second_ctrl_c_ends_everything_at_once(cluster):
    code, _, err = cluster.run("train", acts="stubborn", stop=[signal.SIGINT, signal.SIGINT])
    assert (code, cluster.requeued()) == (130, []), err


def test_an_evaluation_goes_on_when_its_time_is_nearly_over_and_ends_with_sigterm(cluster):
    words = ["evaluate", "--run-dir", "x"]
    code, _, err = cluster.run(*words, acts="deaf", stop=[signal.SIGUSR1, signal.SIGTERM])
    assert (code, cluster.requeued()) == (143, []), err
    code, _, err = cluster.run("evaluate")
    assert code == 2
    assert "of which run?" in err


def test_fresh_moves_a_run_aside_once_and_not_at_each_start_of_the_job(cluster):
    run = cluster.folder / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    words = ["train", "--fresh", "--run-dir", run]
    cluster.run(*words, acts="exit70,exit70,exit70")
    cluster.run(*words, acts="exit70,exit70,exit70", env={"SLURM_RESTART_COUNT": "1"})
    assert ["--fresh" in argv for argv, _ in cluster.calls()] == [True, True], "it was not moved yet"
    run.rename(cluster.folder / "aside")
    run.mkdir()
    (run / "config.yaml").touch()
    cluster.run(*words, acts="exit70,exit70,exit70", env={"SLURM_RESTART_COUNT": "2"})
    assert "--fresh" not in cluster.calls()[-1][0]


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_NTASKS_PER_NODE"])
def test_what_is_in_slurms_variables_is_never_run(name, cluster):
    code, _, err = cluster.run("train", env={name: "1; touch canary $(touch canary)"})
    assert code == 2
    assert f"{name}=" in err
    assert "Traceback" not in err
    assert cluster.calls() == []
    assert not (cluster.folder / "canary").exists()


def test_a_dry_run_shows_the_command_and_starts_nothing(cluster):
    code, out, err = cluster.run("train", options=["--dry-run"], env={"RANK": "3", "WORLD_SIZE": "4"})
    assert code == 0, err
    assert "srun --job-name=lockstep" in out
    assert cluster.calls() == []
    assert not (cluster.folder / "runs").exists()
