"""Jobs in processes: all done once, failures told, deaths noticed, nobody left behind."""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.crew import run_jobs
from data_pipeline.fault import UserError

# What workers do must be found by its name in a process that starts anew.
JOBS = """
import os, signal, sys, time
from functools import partial
from pathlib import Path
from data_pipeline.crew import run_jobs
from data_pipeline.fault import UserError

def write(folder, job, tick):
    number, ticks = job[:2]
    for _ in range(ticks):
        tick()
    with (folder / str(number)).open("x") as file:
        file.write(str(os.getpid()))

def raise_it(kind, job, tick):
    if job == 3:
        raise {"disk": OSError(28, "No space left on device", "/a"), "user": UserError("bad", mend="mend"),
               "bug": KeyError("lost")}[kind]

def kill(folder, job, tick):
    (folder / str(job)).touch()
    if job == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if job == 3:
        os._exit(3)
    time.sleep(30 if job > 100 else 0)

def linger(folder, job, tick):
    (folder / str(os.getpid())).touch()
    time.sleep(60)

if __name__ == "__main__":
    run_jobs(partial(linger, Path(sys.argv[1])), [1, 2, 3], workers=3, progress=print, describe=str)
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "jobs_of_a_crew.py").write_text(JOBS)
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module("jobs_of_a_crew")
    del sys.modules["jobs_of_a_crew"]


def is_running(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes() != b""  # a dead one not asked for has none
    except OSError:
        return False


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_job_is_done_once_and_every_tick_is_told(jobs, tmp_path, workers):
    folder = tmp_path / "done"
    folder.mkdir()
    told = []
    work = [(number, 3 * number, "x" * 300_000) for number in range(12)]  # more than a pipe holds
    run_jobs(jobs.partial(jobs.write, folder), work, workers=workers, progress=told.append, describe=str)
    assert sorted(int(path.name) for path in folder.iterdir()) == list(range(12))
    assert sum(told) == 3 * sum(range(12))
    processes = {path.read_text() for path in folder.iterdir()}
    assert (processes == {str(os.getpid())}) == (workers == 1)
    assert not any(map(is_running, processes - {str(os.getpid())}))
    assert multiprocessing.active_children() == []


def test_no_jobs_start_nothing():
    run_jobs(pytest.fail, [], workers=4, progress=pytest.fail, describe=str)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("disk", OSError, r"\[Errno 28\] No space left on device: '/a'"),
        ("user", UserError, "bad"),
        ("bug", (RuntimeError, KeyError), "lost"),
    ],
)
def test_the_failure_of_a_job_is_raised_here(jobs, workers, kind, error, words):
    with pytest.raises(error, match=words) as caught:
        run_jobs(jobs.partial(jobs.raise_it, kind), range(9), workers=workers, progress=int, describe=str)
    if kind == "user":
        assert caught.value.mend == "mend"
    if kind == "bug" and workers > 1:
        assert "in raise_it" in str(caught.value)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("job", "words"), [(2, r"was killed from outside \(SIGKILL\)"), (3, "ended with 3")])
def test_a_worker_that_dies_is_noticed_at_once_and_its_job_named(jobs, tmp_path, job, words):
    since = time.monotonic()
    with pytest.raises(UserError, match=f"a worker process {words} at job {job}, with 2 of them") as caught:
        run_jobs(
            jobs.partial(jobs.kill, tmp_path),
            [101, job],
            workers=2,
            progress=int,
            describe=lambda one: f"job {one}",
        )
    assert time.monotonic() - since < 10
    assert caught.value.code == "DATA"
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(jobs, tmp_path, sign):
    folder = tmp_path / "workers"
    folder.mkdir()
    words = [sys.executable, jobs.__file__, str(folder)]
    process = subprocess.Popen(
        words, cwd=Path.cwd(), env={**os.environ, "PYTHONPATH": str(Path.cwd())}, stderr=subprocess.DEVNULL
    )
    while len(list(folder.iterdir())) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    workers = [path.name for path in folder.iterdir()]
    assert all(map(is_running, workers))
    process.send_signal(sign)
    process.wait(timeout=10)
    deadline = time.monotonic() + 5
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
