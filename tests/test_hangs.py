"""Jobs in which a process fails, is killed or stands still: how soon they end, what they say and leave."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.marked_processes import MARK, living

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parent.parent
RUN = ROOT / "training" / "run.py"
BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--nproc_per_node=2", str(RUN)]
ACCELERATE = [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
STEP, STEPS = 7, 12  # the step in which it happens, and all, counted as in metrics.jsonl
HANG = 4.0  # seconds that these jobs may stand still
SLACK = 15  # seconds from the last words to the launcher's end, on a machine that is busy with other tests

# Python runs sitecustomize.py in every process. Here it puts a fault into one process's forward pass.
FAULTS = """
import os, pathlib, re, signal, subprocess, sys, threading, time

def stop_for_three_seconds():
    subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)

def fail():
    raise ZeroDivisionError("injected")

FAULTS = {
    "raise": fail,
    "exit": lambda: sys.exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "stop for three seconds": stop_for_three_seconds,
    # It would take years, and no signal shortens it.
    "hold the lock": lambda: re.match("(a+)+$", "a" * 60 + "b"),
    "leave a thread": lambda: threading.Thread(target=time.sleep, args=(100,)).start(),
}

def inject(name, rank):
    while not hasattr(sys.modules.get("training.loop"), "train"):
        time.sleep(0.01)
    gradients = sys.modules["training.gradients"]
    plain, struck = gradients.sums_of, pathlib.Path("struck")
    def sums_of(job, *rest, **keywords):
        if job.place.done == STEP and not struck.exists():
            struck.write_text(str(time.time()))
            FAULTS[name]()
        return plain(job, *rest, **keywords)
    gradients.sums_of = sums_of

if "FAULT" in os.environ and "training/run.py" in " ".join(sys.orig_argv):
    name, rank = os.environ["FAULT"].split(", rank ")
    if os.environ.get("RANK", "0") == rank:
        threading.Thread(target=inject, args=(name, rank), daemon=True).start()
""".replace("STEP", str(STEP))


class Finished(NamedTuple):
    code: int
    out: str
    err: str  # without what the launcher says
    seconds: float  # from the fault to failure.json, if there is one; the launcher's end is not far


@pytest.fixture
def suffer(digits, tmp_path):
    """`suffer(fault)`: a job of two processes that meets the fault; nothing of it lives on for 5 seconds."""

    def call(fault, *flags, command=TORCHRUN):
        (tmp_path / "sitecustomize.py").write_text(FAULTS)
        known = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "LANG") if key in os.environ}
        clean = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(tmp_path / "hf")}
        own = {"PYTHONPATH": str(tmp_path), "ACCELERATE_USE_CPU": "true", MARK: (mark := uuid.uuid4().hex)}
        common = ["--run-dir", "run", "--data.root", digits, "--data.workers", 1, "--train.max-steps", STEPS]
        network = ["--model.name", "test_resnet", "--checkpoint.every-steps", 5]
        process = subprocess.Popen(
            [str(word) for word in [*command, *common, *network, *flags]],
            cwd=tmp_path,
            env={**known, **clean, **own, "FAULT": fault},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = process.communicate(timeout=150)
            ended = time.time()
            while (left := living(mark)) and time.time() < ended + 5:
                time.sleep(0.05)
        finally:
            process.kill()
            for number in living(mark):
                os.kill(number, signal.SIGKILL)
        assert not left, f"{len(left)} processes live on"
        struck = float((tmp_path / "struck").read_text())
        ours = re.split(r'Traceback \(most recent call last\):\n  File "\S+/bin/', err)[0]
        ours = re.sub(r"^(\x1b\[\S+)?[WE]\d{4} .*\n", "", ours, flags=re.MULTILINE)
        told = tmp_path / "run" / "failure.json"
        said = told.stat().st_mtime if told.exists() else ended
        assert ended - said < SLACK, f"it takes {ended - said} s to end"
        return Finished(process.returncode, out, ours, said - struck)

    return call


def failure(tmp_path):
    return json.loads((tmp_path / "run" / "failure.json").read_text())


def said_once(done, code, rank):
    """The FATAL line, which is the last and the only one."""
    fatal = re.findall(r"^FATAL .*$", done.err, re.MULTILINE)
    assert len(fatal) == 1, done.err
    assert done.err.rstrip().splitlines()[-1] == fatal[0], done.err
    assert re.match(rf"FATAL code={code} rank={rank} host=\S+ step={STEP} hint=", fatal[0]), done.err
    return fatal[0]


@pytest.mark.parametrize(
    ("rank", "command"), [(0, TORCHRUN), (1, [*ACCELERATE, str(RUN)])], ids=["torchrun", "accelerate"]
)
def test_a_process_that_is_killed_ends_the_job_and_is_named_with_the_signal(suffer, tmp_path, rank, command):
    done = suffer(f"kill, rank {rank}", command=command)
    assert done.code != 0
    assert done.seconds < 5
    said_once(done, "CRASH", rank)
    assert f"process {rank} on " in done.err
    assert "was killed by signal 9 (SIGKILL)" in done.err
    assert "Traceback" not in done.err
    assert (failure(tmp_path)["code"], failure(tmp_path)["rank"]) == ("CRASH", rank)


@pytest.mark.parametrize(("fault", "word"), [("raise", "ZeroDivisionError: injected"), ("exit", "sys.exit")])
def test_an_exception_on_process_zero_ends_all_with_its_place(suffer, tmp_path, fault, word):
    done = suffer(f"{fault}, rank 0")
    assert done.code != 0
    assert done.seconds < 5
    said_once(done, "CRASH", 0)
    assert done.err.count("Traceback (most recent call last)") == 1
    assert re.search(
        rf"^process 0 on \S+, step {STEP}, samples \d/\d+, .* and 28 more$", done.err, re.MULTILINE
    )
    told = failure(tmp_path)
    assert (told["rank"], told["step"], told["samples_under_way"]) == (0, STEP, 32)
    assert word in told["what"]


@pytest.mark.parametrize(
    ("fault", "rank", "word"),
    [("stop", 1, "was stopped from outside"), ("hold the lock", 0, "does not answer")],
)
def test_a_process_that_stands_still_ends_the_job_with_the_stacks_of_all(suffer, tmp_path, fault, rank, word):
    done = suffer(f"{fault}, rank {rank}", "--train.hang-minutes", HANG / 60)
    assert done.code != 0
    assert HANG <= done.seconds < HANG + 5
    said_once(done, "HANG", rank)
    assert f"process {rank} stands still" in done.err
    assert word in done.err
    assert "waiting for the others" in done.err
    assert failure(tmp_path)["code"] == "HANG"
    for each in (0, 1):
        assert "training/loop.py" in (tmp_path / "run" / "stacks" / f"rank-{each}.txt").read_text()


def test_a_process_alone_that_never_gives_up_the_interpreter_is_ended_too(suffer, tmp_path):
    done = suffer("hold the lock, rank 0", "--train.hang-minutes", HANG / 60, command=[sys.executable, RUN])
    assert done.code == -signal.SIGKILL
    assert HANG <= done.seconds < HANG + 5
    assert re.fullmatch(r"error: no progress for 4 seconds: .*\nFATAL code=HANG rank=0 .*\n", done.err)
    assert failure(tmp_path)["code"] == "HANG"
    assert "training/loop.py" in (tmp_path / "run" / "stacks" / "rank-0.txt").read_text()


def test_a_pause_shorter_than_a_hang_changes_nothing_and_a_thread_that_is_left_holds_nobody(suffer, tmp_path):
    flags = ["--train.hang-minutes", 20 / 60]
    paused = suffer("stop for three seconds, rank 1", *flags)
    assert (paused.code, paused.err) == (0, "")
    shutil.move(tmp_path / "run", tmp_path / "paused")
    (tmp_path / "struck").unlink()
    plain = suffer("leave a thread, rank 0", *flags)
    assert (plain.code, plain.err) == (0, "")
    runs = [tmp_path / name / "weights" / "last.safetensors" for name in ("paused", "run")]
    assert runs[0].read_bytes() == runs[1].read_bytes()
    assert not (tmp_path / "run" / "stacks").exists()

    # Nobody reads on: `evaluate | head`.
    evaluate = [*TORCHRUN, "evaluate", "--run-dir", "run"]
    reading, writing = os.pipe()
    os.close(reading)
    piped = subprocess.run(
        evaluate, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=100
    )
    os.close(writing)
    assert piped.returncode != 0
    assert "FATAL" not in piped.stderr
    assert "last_words" not in piped.stderr
    assert not (tmp_path / "run" / "failure.json").exists()
