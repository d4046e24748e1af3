"""Disks that fail: full, read-only, broken or slow, for a while or for good; whole runs and single saves.

A full disk is a small one of its own in memory where this user may mount one; elsewhere, and where one file
is what matters, it is the system's own limit on the size of files, which strikes at the same place.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from training.checkpoints.protocol import checkpoints, newest_verified, read_tensors
from training.checkpoints.retention import Retention
from training.checkpoints.storage_failures import tell_of_room
from training.checkpoints.weight_copies import WeightCopies
from training.checkpoints.writer import CheckpointWriter, Plan

ROOT = Path(__file__).parent.parent
MODEL = "model.safetensors"


def save(writer, step, *, then=lambda path: ()):
    state = {MODEL: {"weight": torch.full((100, 100), float(step))}, "optimizer.safetensors": {}}
    writer.save(Plan(step, {}, None, lambda: None, then), state)
    writer.busy(None)
    return writer.outcome()


@pytest.fixture
def folder(tmp_path):
    """Where checkpoints are."""
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture
def writer(folder):
    """A writer that has saved step 1."""
    writer = CheckpointWriter(folder, Retention(1))
    assert save(writer, 1).error is None
    return writer


def assert_step_1_alone_is_there(folder):
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert newest_verified(folder, say=pytest.fail) == folder / "step-00000001"


def test_a_file_that_does_not_fit_fails_the_save_which_leaves_nothing_and_the_next_one_succeeds(
    writer, folder, file_limit
):
    with file_limit(20_000):
        error = save(writer, 2).error
    assert error.errno == errno.EFBIG
    assert_step_1_alone_is_there(folder)
    assert save(writer, 3).error is None
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]


FAULTS = {
    "write": [errno.ENOSPC, errno.EDQUOT, errno.EIO],
    "fsync": [errno.EIO],
    "rename": [errno.EIO],
    "mkdir": [errno.EROFS],
    "open": [errno.ENOSPC, errno.EROFS],
}


@pytest.mark.parametrize(("name", "number"), [(name, one) for name, many in FAULTS.items() for one in many])
def test_whichever_call_of_the_system_fails_the_older_checkpoint_stays_and_nothing_else(
    writer, folder, monkeypatch, name, number
):
    """Each call in turn fails once, as a broken disk would have it: the save before the last one is taken."""
    real = getattr(os, name)
    for turn in itertools.count():
        calls, failed = itertools.count(), []

        def fail(*arguments, calls=calls, failed=failed, turn=turn):
            changing = name != "open" or arguments[1] & os.O_CREAT
            if changing and next(calls) == turn:
                failed.append(arguments)
                raise OSError(number, os.strerror(number), str(arguments[0]))
            return real(*arguments)

        monkeypatch.setattr(os, name, fail)
        outcome = save(writer, 2)
        monkeypatch.setattr(os, name, real)
        if not failed or outcome.unpruned is not None:
            break
        assert outcome.error.errno == number
        assert_step_1_alone_is_there(folder)
    assert turn > 0
    assert outcome.error is None
    assert newest_verified(folder, say=pytest.fail) == folder / "step-00000002"


def test_what_reads_back_differently_is_not_committed(writer, folder, monkeypatch):
    real = os.write

    def flip(descriptor, content):
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 4
        return real(descriptor, changed)

    monkeypatch.setattr(os, "write", flip)
    error = save(writer, 2).error
    monkeypatch.setattr(os, "write", real)
    assert isinstance(error, OSError)
    assert "reads back differently" in str(error)
    assert_step_1_alone_is_there(folder)


def test_weights_that_find_no_room_stay_owed_with_their_checkpoint_until_there_is(
    writer, folder, file_limit, capsys
):
    weights = folder.parent / "weights"
    weights.mkdir()
    copies = WeightCopies(weights, MODEL)

    def copied(names):
        def then(path):
            copies.owe(path, names, about=f"{names}\n")
            with file_limit(20_000):
                return copies.pay()

        return then

    assert save(writer, 2, then=copied(["last", "best"])).error is None
    assert save(writer, 3, then=copied(["last"])).error is None
    assert sorted(copies.owed) == ["best", "last"]
    assert list(weights.iterdir()) == [], "no half of one either"
    assert [path.name for path in checkpoints(folder)] == ["step-00000003", "step-00000002"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "last.safetensors" in said[0]
    assert "40,080 bytes needed" in said[0]
    assert copies.pay() == []
    assert {path.name for path in weights.iterdir()} == {"best.safetensors", "last.safetensors", "model.json"}
    steps = [int(read_tensors(weights, f"{name}.safetensors")["weight"][0, 0]) for name in ("best", "last")]
    assert steps == [2, 3]


def test_copies_that_a_kill_came_before_are_found_out(writer, folder):
    weights = folder.parent / "weights"
    weights.mkdir()
    copies, newest = WeightCopies(weights, MODEL), folder / "step-00000001"
    assert copies.outdated(newest, ["last", "best"]) == ["last", "best"]
    copies.owe(newest, ["last"], about="")
    copies.pay()
    assert copies.outdated(newest, ["last", "best"]) == ["best"]
    assert save(writer, 2).error is None
    assert copies.outdated(folder / "step-00000002", ["last"]) == ["last"]


def test_too_little_room_for_two_checkpoints_is_said_with_the_volume(tmp_path, capsys):
    tell_of_room(tmp_path, 1000)
    assert capsys.readouterr().err == ""
    tell_of_room(tmp_path / "not" / "there" / "yet", 10**15)
    said = capsys.readouterr().err
    device = tmp_path.stat().st_dev
    volume = next(one for one in reversed(tmp_path.parents) if one.stat().st_dev == device)
    assert "1,000,000,000,000,000 bytes" in said
    assert f"'{volume}'" in said


# Whole runs.

STEPS, EVERY = 40, 4


def command(digits, run_dir, *more, processes=1):
    launcher = [Path(sys.executable).parent / "torchrun", f"--nproc_per_node={processes}"]
    start = [sys.executable] if processes == 1 else launcher
    flags = {
        "--data.root": digits,
        "--run-dir": run_dir,
        "--model.name": "test_resnet",
        "--train.max-steps": STEPS,
        "--train.ema": 0.9,
        "--data.workers": 0,
        "--checkpoint.every-steps": EVERY,
    }
    words = [*start, ROOT / "training" / "run.py", *(word for pair in flags.items() for word in pair), *more]
    return [str(word) for word in words]


def started(words, folder, **keywords):
    known = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "LANG") if key in os.environ}
    env = {**known, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **keywords.pop("env", {})}
    return subprocess.Popen(
        words,
        cwd=folder,
        env=env,
        stdout=(folder / "out").open("w"),
        stderr=(folder / "err").open("w"),
        start_new_session=True,
        **keywords,
    )


def ended(process, folder, within=150):
    try:
        return process.wait(within), (folder / "err").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def waited(process, look, within=100):
    end = time.monotonic() + within
    while time.monotonic() < end and process.poll() is None:
        if look():
            return
        time.sleep(0.01)
    pytest.fail(f"it did not come to that; exit code {process.poll()}")


def records(run_dir):
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{**one, "seconds": None} for one in found if one["kind"] != "start"]


class SmallDisk:
    """A folder on a disk of 48 MB in memory, or one whose processes may write no large file."""

    def __init__(self, folder):
        self.folder, self.process = folder, None
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "none", str(folder)]
        self.own = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def fill(self):
        if not self.own:
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
            return
        with contextlib.suppress(OSError), (self.folder / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass
            while file.write(bytes(1)):
                pass

    def clear(self):
        if self.own:
            (self.folder / "filler").unlink()
        else:
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, unlimited)

    def leave(self):
        if self.own:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.leave()


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_changes_nothing_of_what_is_learned(digits, tmp_path, disk):
    run_dir, whole = disk.folder / "run", tmp_path / "whole"
    patient = ["--checkpoint.max-failures", 1000]
    disk.process = process = started(command(digits, run_dir, *patient), tmp_path)
    waited(process, (run_dir / "checkpoints" / "step-00000004").exists)
    os.kill(process.pid, signal.SIGSTOP)
    disk.fill()
    os.kill(process.pid, signal.SIGCONT)
    troubles = ("checkpoint 2 of 1000 failed in a row", "records wait")
    waited(process, lambda: all(one in (tmp_path / "err").read_text() for one in troubles))
    newest = newest_verified(run_dir / "checkpoints", say=pytest.fail)
    disk.clear()
    code, said = ended(process, tmp_path)
    assert code == 0, said
    assert f"newest good one: {newest.name}" in said
    assert "model.safetensors: No space left" in said or not disk.own
    assert "bytes needed, " in said
    assert "bytes free" in said
    assert said.count("records wait") == 1
    assert not list(run_dir.rglob(".*"))

    code, said = ended(started(command(digits, whole), tmp_path), tmp_path)
    assert (code, said) == (0, "")
    assert records(run_dir) == records(whole)
    for path in ("weights/last.safetensors", "weights/best.safetensors"):
        assert (run_dir / path).read_bytes() == (whole / path).read_bytes()
    assert checkpoints(run_dir / "checkpoints")[0].name == f"step-{STEPS:08d}"


@pytest.mark.slow
def test_a_disk_that_is_full_for_good_ends_the_run_after_three_failed_saves(digits, tmp_path):
    first = ["--train.max-steps", 4, "--data.val-split", "none"]
    code, said = ended(started(command(digits, "run", *first), tmp_path), tmp_path)
    assert code == 0, said

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))

    again = command(digits, "run", "--data.val-split", "none", processes=2)
    code, said = ended(started(again, tmp_path, preexec_fn=limited), tmp_path)
    assert code != 0
    assert [f"checkpoint {one} of 3 failed in a row" in said for one in (1, 2, 3, 4)] == [True] * 3 + [False]
    (fatal,) = [line for line in said.splitlines() if line.startswith("FATAL")]
    assert fatal.startswith("FATAL code=STORAGE rank=0 ")
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert failure["code"] == "STORAGE"
    assert "bytes needed" in failure["what"]
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir() if path.name > "step-00000004"] == []
    assert newest_verified(folder, say=pytest.fail) == folder / "step-00000004"
    exits = [line for line in said.splitlines() if "exitcode" in line]
    assert any("74" in line for line in exits), said


SLOW = """
import os, time

real = os.fsync

def slowly(descriptor):
    time.sleep(0.5)
    real(descriptor)

if os.environ.get("RANK") == "0":
    os.fsync = slowly
"""


@pytest.mark.slow
def test_a_save_that_takes_longer_than_processes_may_wait_for_one_another_ends_nothing(digits, tmp_path):
    """Python runs sitecustomize.py in every process: here it makes the disk of process zero slow."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    flags = ["--train.max-steps", 4, "--data.val-split", "none", "--train.timeout-seconds", 4]
    began = time.monotonic()
    words = command(digits, "run", *flags, "--train.hang-minutes", 4 / 60, processes=2)
    code, said = ended(started(words, tmp_path, env={"PYTHONPATH": str(tmp_path)}), tmp_path)
    assert code == 0, said
    assert time.monotonic() - began > 8, "it was slow enough to tell"
    folder = tmp_path / "run" / "checkpoints"
    assert newest_verified(folder, say=pytest.fail) == folder / "step-00000004"
