"""What signals to stop do before training has begun."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.marked_processes import MARK, living, wait_until

ROOT = Path(__file__).parent.parent.parent

# A mutex that is locked twice: the main thread waits inside of a library, where no signal wakes it.
WAITS = """
import ctypes, sys
from pathlib import Path
from training.early_signals import stop_before_training
from training.vigil.place import Place
stop_before_training(sys.argv[2:], Place(run_dir=Path(sys.argv[1])))
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
library.pthread_mutex_lock(mutex)
print("waits", flush=True)
library.pthread_mutex_lock(mutex)
"""


def waiting(run_dir, *words, before=""):
    command = [sys.executable, "-c", before + WAITS, str(run_dir), *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=env, **pipes)
    assert process.stdout.readline() == "waits\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_before_training_a_signal_ends_a_process_at_once_also_where_a_library_waits(number, tmp_path):
    process = waiting(tmp_path, "train", before="import signal; signal.signal(1, signal.SIG_DFL)\n")
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (75, "")
    said, fatal = err.splitlines()
    assert said == f"stopped on {number.name}, before training began: nothing is lost"
    assert fatal.startswith("FATAL code=STOPPED rank=0 ")
    assert json.loads((tmp_path / "failure.json").read_text())["code"] == "STOPPED"


def test_what_evaluates_dies_of_the_signal_and_what_nohup_protects_lives_on(tmp_path):
    process = waiting(tmp_path, "evaluate")
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM
    process.communicate()

    process = waiting(tmp_path, "train", before="import signal; signal.signal(1, signal.SIG_IGN)\n")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.terminate()
    assert process.wait(10) == 75
    process.communicate()


STOPS = [
    "import os, sys, time",
    "from data_pipeline import torchvision_cpu",
    "def stop(*_, **__):",
    "    os.kill(os.getpid(), 15)",
    "    time.sleep(60)",
    "torchvision_cpu.declare_missing_operators = stop",
    "sys.argv = ['run.py', *sys.argv[1:]]",
    "import runpy",
    f"runpy.run_path({str(ROOT / 'training' / 'run.py')!r}, run_name='__main__')",
]


def test_a_run_that_is_stopped_before_it_has_loaded_anything_says_so(script, tmp_path):
    (tmp_path / "run").mkdir()
    done = script("\n".join(STOPS), "train", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 75, done.stderr
    assert done.stderr.splitlines()[-1].startswith("FATAL code=STOPPED rank=0 ")
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["what"].startswith(
        "stopped on SIGTERM"
    )


TIMES = """
import json, sys
from pathlib import Path
from training.save_times import SaveTimes
run = Path(sys.argv[1])
times = SaveTimes(run)
times.stopped(None)
assert not (run / "save_times.json").exists()
for seconds in (2.0, 1.0, 3.0):
    times.saved(seconds)
times.stopped(0.5)
assert json.loads((run / "save_times.json").read_text()) == {"save": 3.0, "stop": 0.5}
SaveTimes(run).saved(1.0)
assert json.loads((run / "save_times.json").read_text()) == {"save": 1.0, "stop": 0.5}
(run / "save_times.json").write_text("[[")
SaveTimes(run).saved(1.0)
SaveTimes(run / "nowhere").saved(1.0)
print("noted")
"""


def test_the_longest_save_of_a_start_and_the_last_stop_are_noted(script, tmp_path):
    done = script(TIMES, str(tmp_path))
    assert (done.stdout, done.stderr) == ("noted\n", "")


@pytest.mark.slow
def test_signals_that_reach_every_process_of_a_job_its_readers_too_stop_it_with_a_checkpoint(
    digits, tmp_path
):
    """As SLURM sends them where it does not keep the processes of a job apart (proctrack/linuxproc)."""
    run, mark = tmp_path / "run", f"{os.getpid()}-{tmp_path.name}"
    words = ["--run-dir", run, "--data.root", digits, "--model.name", "test_resnet", "--train.epochs", 1000]
    command = [sys.executable, ROOT / "training" / "run.py", *words, "--data.workers", 2]
    process = subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = run / "metrics.jsonl"
    assert wait_until(lambda: metrics.exists() and metrics.read_text().count('"train"') > 3)
    all_of_them = living(mark)
    assert len(all_of_them) > 2
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
        for one in all_of_them:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert [line for line in err.splitlines() if "FATAL" in line] == [err.splitlines()[-1]]
    assert "code=STOPPED" in err.splitlines()[-1]
    assert list((run / "checkpoints").iterdir())
    assert wait_until(lambda: not living(mark), within=5)
    assert json.loads((run / "save_times.json").read_text())["stop"] > 0
