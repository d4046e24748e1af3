"""The doctor of machines: what it judges, what it looks at, and the command."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys

import pytest

from data_pipeline.findings import HURTS, NOTE
from launch import gpus, machine
from launch.machine import Gpu, Machine, Place, Torch, free_memory, look_around, try_place
from launch.machine_findings import KINDS, judge
from training.config import Config

GIB = 1 << 30
H200 = Gpu("NVIDIA H200", 139 * GIB, 138 * GIB, bfloat=True)
T4 = Gpu("Tesla T4", 15 * GIB, 15 * GIB, bfloat=False)


def box(*, number=2, **other):
    """A machine with GPUs on which all is well."""
    good = {
        "cores": 8 * max(1, number),
        "memory": 64 * GIB,
        "driver": number > 0,
        "torch": Torch("2.13.0", "13.0", (H200,) * number),
        "files": 1 << 20,
        "address": "10.0.0.1",
        "compiler": "/usr/bin/cc",
        "place": Place("/runs", 1000 * GIB, 1e9),
    }
    return Machine(**good | other)


def config(**sections):
    return Config.model_validate(sections)


def codes(machine, *, given=None, processes=2):
    return [finding.code for finding in judge(machine, given, processes)]


@pytest.mark.parametrize("number", [0, 1, 2, 8])
def test_of_a_machine_on_which_all_is_well_nothing_is_said(number):
    well = box(number=number)
    assert codes(well, given=config(), processes=max(1, number)) == []
    assert codes(well, given=config(train={"precision": "bf16"}), processes=1) == []


@pytest.mark.parametrize(
    ("code", "ill", "what"),
    [
        ("torch", box(number=0, torch=Torch(trouble="no libcudart")), "no libcudart"),
        ("no-gpu", box(torch=Torch("2.13.0", "")), "torch 2.13.0 is built for CPUs only"),
        ("no-gpu", box(torch=Torch("2.13.0", "13.0")), "sees no GPU, though there is a driver"),
        (
            "gpu-taken",
            box(torch=Torch("2.13.0", "13.0", (H200, H200._replace(free=100 * GIB)))),
            "GPU 1 (NVIDIA H200): 39.0 of 139.0 GiB are taken",
        ),
        ("gpus-differ", box(torch=Torch("2.13.0", "13.0", (H200, T4))), "NVIDIA H200, Tesla T4"),
        ("few-cores", box(cores=1), "1 core for 2 processes"),
        ("cores-of-readers", box(cores=7), "7 cores for 2 processes and their readers, on GPUs"),
        ("cores-of-readers", box(number=0, cores=1), "few"),
        ("little-memory", box(memory=2 * GIB), "2.0 GiB are free for 2 processes"),
        ("open-files", box(files=64), "64 may be open at once, 128 are needed"),
        ("no-network", box(address=None), "other machines cannot be reached"),
        ("run-folder", box(place=Place("/runs", trouble="Read-only file system")), "'/runs': Read-only"),
        ("little-room", box(place=Place("/runs", GIB // 2, 1e9)), "0.50 GiB are free"),
        ("slow-disk", box(place=Place("/runs", 9 * GIB, 7e6)), "takes 7 MB a second"),
    ],
)
def test_what_is_wrong_with_a_machine_is_named_with_its_figures(code, ill, what):
    if what == "few":  # with readers, of a configuration
        (found,) = judge(ill, config(data={"workers": 3}), 1)
        what = "1 core for 1 process with 3 readers each"
    else:
        (found,) = judge(ill, None, 2)
    assert found.code == code
    assert what in found.what
    assert found.mend
    assert found.kind.severity in (HURTS, NOTE)


@pytest.mark.parametrize(
    ("code", "ill", "sections"),
    [
        ("no-compiler", box(compiler=None), {"model": {"compile": True}}),
        ("precision", box(number=0), {"train": {"precision": "fp16"}}),
        ("precision", box(torch=Torch("2.13.0", "13.0", (T4, T4))), {"train": {"precision": "bf16"}}),
        ("small-batch", box(), {"train": {"global_batch": 1}, "data": {"lanes": 1}}),
    ],
)
def test_what_a_run_asks_for_and_the_machine_has_not_is_named(code, ill, sections):
    assert codes(ill, given=config(**sections)) == [code]
    assert code not in codes(ill, given=config())
    assert codes(ill) == []


def test_every_kind_of_finding_is_made_by_one_of_these_tests():
    tables = [
        mark.args[1]
        for test in (
            test_what_is_wrong_with_a_machine_is_named_with_its_figures,
            test_what_a_run_asks_for_and_the_machine_has_not_is_named,
        )
        for mark in test.pytestmark
    ]
    assert {case[0] for table in tables for case in table} == set(KINDS)


def test_this_machine_is_what_the_kernel_says_it_is(tmp_path):
    found = look_around(tmp_path / "runs" / "one")
    assert found.cores == len(os.sched_getaffinity(0))
    assert 0 < found.memory <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    version = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.torch.version == version.stdout.strip()
    assert found.place.folder == tmp_path
    assert found.place.free > 0
    assert found.place.rate > 0
    assert list(tmp_path.iterdir()) == []


def test_a_torch_that_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert (
        look_around(tmp_path).torch.trouble == "ImportError: libcudart.so.13: cannot open shared object file"
    )


def test_a_driver_that_torch_was_not_built_for_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(gpus, "DEVICES", (str(tmp_path / "nvidiactl"),))
    monkeypatch.setattr(machine, "_ask_torch", lambda: Torch("2.13.0+cpu"))
    assert [one.code for one in judge(look_around(tmp_path), None, 1)] == ["no-gpu"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert judge(look_around(tmp_path), None, 1) == []


def test_a_control_group_has_less_memory_than_the_machine(tmp_path, monkeypatch):
    own = machine.Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    group = tmp_path / own
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{5 * GIB}\n")
    (group / "memory.current").write_text(f"{4 * GIB}\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    assert free_memory() == GIB
    (group / "memory.max").write_text("max\n")
    assert free_memory() > GIB


def test_a_disk_without_locks_cannot_hold_runs(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert try_place(tmp_path).trouble == "No locks available"
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_the_runs_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    assert try_place(tmp_path / "runs").trouble == "Not a directory"


def test_the_command_examines_this_machine_alone_and_with_the_data_of_a_recipe(lockstep, digits, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"data: {{root: '{digits}'}}\n")
    alone = lockstep("doctor", "--cpu", cwd=tmp_path)
    assert (alone.returncode, alone.stderr) == (0, "")
    assert alone.stdout.startswith(f"machine   {len(os.sched_getaffinity(0))} core")
    assert alone.stdout.splitlines()[-1].startswith("this machine: nothing that hurts was found")
    both = lockstep("doctor", "--cpu", "--config", "mine.yaml", "--sample", 10, cwd=tmp_path)
    assert both.returncode == 0
    assert "this machine: nothing that hurts" in both.stdout
    assert both.stdout.splitlines()[-1].startswith("1,797 samples in ")
    said = json.loads(lockstep("doctor", "--cpu", "--json", "--config", "mine.yaml", cwd=tmp_path).stdout)
    assert said["dataset"] == str(digits)
    assert said["machine"]["torch"]["gpus"] == said["machine"]["findings"] == said["findings"] == []


def test_the_command_fails_where_a_run_would_hurt_and_refuses_what_is_wrong(lockstep, digits, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"data: {{root: '{digits}'}}\ntrain: {{precision: fp16}}\n")
    hurt = lockstep("doctor", "--cpu", "--config", "mine.yaml", "--sample", 10, cwd=tmp_path)
    assert hurt.returncode == 1
    assert "What would hurt:\n  precision\n    train.precision fp16 needs a GPU\n" in hurt.stdout
    (tmp_path / "mine.yaml").write_text("data: {rooot: nowhere}\n")
    wrong = lockstep("doctor", "--config", "mine.yaml", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "FATAL code=CONFIG " in wrong.stderr


def test_the_embedded_data_is_examined_once_it_is_there(lockstep, tmp_path):
    first = lockstep("doctor", "--cpu", "--config", "digits", cwd=tmp_path)
    assert first.returncode == 0
    assert "samples in" not in first.stdout
    assert list(tmp_path.iterdir()) == []
