"""Whole runs, as a user starts them: real launchers, real processes, real kills; what they leave is compared.

Runs that several tests look at happen once (`once`), also where pytest-xdist spreads tests over processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from data_pipeline.index import index_path, read_dataset
from data_pipeline.items import SourceOptions
from data_pipeline.pack import pack
from data_pipeline.shard_index import read_shard_index
from data_pipeline.sources import find_source
from tests.marked_processes import DEADLINE, MARK, living, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parent.parent
RUN = ROOT / "training" / "run.py"
BIN = Path(sys.executable).parent
STEPS, EPOCH, EVERY = 30, 22, 4  # of the runs below: steps in all, steps an epoch, steps between checkpoints

PYTHON = [sys.executable, str(RUN)]
MODULE = [sys.executable, "-m", "training.run"]
ACCELERATE = [str(BIN / "accelerate"), "launch"]


def torchrun(processes):
    return [str(BIN / "torchrun"), f"--nproc_per_node={processes}", str(RUN)]


def launcher_of(processes):
    return PYTHON if processes == 1 else torchrun(processes)


class Running(NamedTuple):
    process: subprocess.Popen
    mark: str
    folder: Path
    name: str


class Finished(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float


def start(command, *, folder, name="run", cwd=None, env=None):
    """Start a command in a session of its own; `folder` keeps what it says."""
    mark = uuid.uuid4().hex
    known = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "LANG") if key in os.environ}
    clean = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "hf"), MARK: mark}
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd or folder,
        env={**known, **clean, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=(folder / f".{name}.out").open("wb"),
        stderr=(folder / f".{name}.err").open("wb"),
        start_new_session=True,
    )
    return Running(process, mark, folder, name)


def finish(running, *, within=DEADLINE):
    """Wait for the end of a run, whatever it is; processes that outlive it by five seconds are a fault."""
    started = time.monotonic()
    try:
        code = running.process.wait(timeout=within)
        left = wait_until(lambda: not living(running.mark) or None, within=5) is None
        assert not left, f"left over: {living(running.mark)}"
    finally:
        for number in living(running.mark):
            os.kill(number, signal.SIGKILL)
        running.process.wait()
    said = [(running.folder / f".{running.name}.{end}").read_text(errors="replace") for end in ("out", "err")]
    return Finished(code, *said, time.monotonic() - started)


def run(command, **keywords):
    return finish(start(command, **keywords))


def succeed(command, **keywords):
    done = run(command, **keywords)
    assert done.code == 0, done.out + done.err
    return done


def records(run_dir, kind=None):
    try:
        text = (run_dir / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    whole = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [one for one in whole if kind in (None, one["kind"])]


def results(run_dir):
    """All records but those of starts, without seconds: what a kill and a resume must not change."""
    found = [one for one in records(run_dir) if one["kind"] != "start"]
    return [{name: value for name, value in one.items() if name != "seconds"} for one in found]


def steps_of(run_dir):
    return [one["step"] for one in records(run_dir, "train")]


def digests(run_dir):
    return [one["batch_digest"] for one in records(run_dir, "train")]


def weights_sha(run_dir, name="last"):
    return hashlib.sha256((run_dir / "weights" / f"{name}.safetensors").read_bytes()).hexdigest()


def failure(run_dir):
    return json.loads((run_dir / "failure.json").read_text())


def reaches(run_dir, step):
    return lambda: step in steps_of(run_dir)


def refused(done, code, *words, lines=2):
    """Exit 2 and, on stderr, one line a mistake and the FATAL line."""
    said = done.err.strip().splitlines()
    assert done.code == 2, done.err
    assert len(said) == lines, done.err
    assert said[-1].startswith(f"FATAL code={code} rank=0 "), done.err
    for word in words:
        assert word in done.err, done.err


@pytest.fixture(scope="session")
def common(digits):
    """The flags of the runs that are compared with one another."""
    flags = {
        "--data.root": digits,
        "--model.name": "test_resnet",
        "--train.max-steps": STEPS,
        "--checkpoint.every-steps": EVERY,
        "--checkpoint.keep": 3,
        "--debug.batch-digest": "pixels",
    }
    return [word for pair in flags.items() for word in pair]


@pytest.fixture(scope="session")
def whole(once, common):
    """`whole(processes)`: the directory of a run that nothing disturbs, with `processes` - 1 workers each."""

    def get(processes):
        def make(folder):
            flags = ["--run-dir", "run", "--data.workers", processes - 1]
            succeed([*launcher_of(processes), *common, *flags], folder=folder, name="whole")

        return once(f"whole-{processes}", make) / "run"

    return get


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of a finished run with one process, to go on from or to damage."""
    shutil.copytree(whole(1), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def small(once):
    """36 samples to learn from in four shards, splits of 7 and of 1 to evaluate: JPEGs of three classes."""

    def make(folder):
        draws = np.random.default_rng(0)
        for split, counts in {"train": (12, 12, 12), "val": (3, 2, 2), "test": (1,)}.items():
            for label, count in enumerate(counts):
                (folder / "pictures" / split / f"class{label}").mkdir(parents=True)
                for number in range(count):
                    pixels = draws.integers(80 * label, 80 * label + 90, (32, 32, 3)).astype(np.uint8)
                    path = folder / "pictures" / split / f"class{label}" / f"{number}.jpg"
                    Image.fromarray(pixels).save(path, quality=90)
        source = find_source(folder / "pictures", SourceOptions())
        pack(source, folder / "packed", workers=1, seed=0, shard_samples=10, shard_bytes=1 << 30)

    return once("small", make) / "packed"


def flags_for_small(root):
    flags = {
        "--data.root": root,
        "--data.train-transforms": "[]",
        "--model.name": "test_resnet",
        "--train.global-batch": 12,
        "--eval.batch": 2,
    }
    return [word for pair in flags.items() for word in pair]


# Check 3: every way to start it. Plain python and torchrun with an absolute path are all over this file.

LAUNCHES = {
    "accelerate launch with a relative path": ([*ACCELERATE, "training/run.py"], "checkout", 1),
    "accelerate launch with an absolute path": ([*ACCELERATE, str(RUN)], "elsewhere", 1),
    "accelerate launch with two processes": (
        [*ACCELERATE, "--multi_gpu", "--num_processes=2", "--main_process_port=0", str(RUN)],
        "elsewhere",
        2,
    ),
    "python with a relative path": ([sys.executable, "training/run.py"], "checkout", 1),
    "python -m": ([sys.executable, "-m", "training.run"], "checkout", 1),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_every_way_to_start_it_trains(name, digits, tmp_path):
    command, where, processes = LAUNCHES[name]
    if where == "checkout":
        cwd, run_dir, flags = ROOT, tmp_path / "run", ["--run-dir", tmp_path / "run", "--data.root", digits]
    else:  # everything by default: the embedded data set is packed and the run directory made where we stand
        cwd, run_dir, flags = tmp_path, tmp_path / "runs" / "digits", ["--model.name", "test_resnet"]
    done = succeed([*command, *flags, "--train.max-steps", 2], folder=tmp_path, cwd=cwd)
    (begun,) = records(run_dir, "start")
    assert begun["processes"] == processes
    assert steps_of(run_dir) == [1, 2]
    assert f"processes {processes}" in done.out
    assert (run_dir / "weights" / "best.safetensors").exists()
    assert (tmp_path / "data" / "digits" / "dataset.json").exists() is (where == "elsewhere")


def test_a_checkout_that_was_never_installed_trains(digits, tmp_path):
    """Without our entry point, which torch would load: timm and torchvision are imported all the same."""
    flags = ["--run-dir", "run", "--data.root", digits, "--model.name", "test_resnet", "--train.max-steps", 1]
    succeed([*PYTHON, *flags], folder=tmp_path, env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    assert steps_of(tmp_path / "run") == [1]


def test_a_launcher_that_starts_fewer_processes_than_asked_for_is_found_out(digits, tmp_path):
    command = [*ACCELERATE, "--cpu", "--num_processes", "2", RUN, "--run-dir", "run", "--data.root", digits]
    done = run(command, folder=tmp_path)
    assert done.code != 0
    assert "FATAL code=USAGE rank=0 " in done.err
    assert "lockstep launch --cpu --processes-per-node 2 -- --run-dir run --data.root" in done.err
    assert not (tmp_path / "run").exists()


def test_a_world_size_that_nobody_joins_is_found_out(digits, tmp_path):
    command = [*PYTHON, "--run-dir", "run", "--data.root", digits]
    done = run(command, folder=tmp_path, env={"WORLD_SIZE": "2"})
    refused(done, "USAGE", "2 processes were asked for")
    assert not (tmp_path / "run").exists()


# Check 4: one order, the same pixels, on any topology.


@pytest.mark.parametrize("processes", [2, 3])
def test_batches_are_the_same_bits_on_any_number_of_processes_and_workers(whole, processes):
    one = digests(whole(1))
    assert len(one) == len(set(one)) == STEPS
    assert digests(whole(processes)) == one
    begun = [records(whole(count), "start")[0] for count in (1, processes)]
    assert [(each["processes"], each["workers"]) for each in begun] == [(1, 0), (processes, processes - 1)]


def test_batches_do_not_depend_on_the_micro_batch(whole, common, tmp_path):
    flags = ["--run-dir", "run", "--train.micro-batch", 7, "--train.max-steps", 6]
    succeed([*MODULE, *common, *flags], folder=tmp_path)
    assert digests(tmp_path / "run") == digests(whole(1))[:6]


def test_another_seed_gives_other_batches(whole, common, tmp_path):
    flags = ["--run-dir", "run", "--seed", 1, "--train.max-steps", 3]
    succeed([*PYTHON, *common, *flags], folder=tmp_path)
    assert not set(digests(tmp_path / "run")) & set(digests(whole(1)))


@pytest.mark.parametrize(("batch", "micro_batch"), [(2, "none"), (7, 2)])
def test_gradients_are_those_of_the_whole_batch_however_it_is_dealt_out(common, batch, micro_batch, tmp_path):
    """Also where a process has no sample at all and where the last micro-batch is smaller.

    Plain gradient descent shows their size (Adam hides it); no BatchNorm, which sees only its share.
    """
    import timm
    import torch
    from safetensors.torch import load_file

    flags = ["--train.global-batch", batch, "--train.max-steps", 4, "--model.name", "test_convnext"]
    flags += ["--optim.name", "sgd", "--optim.lr", 0.1, "--optim.warmup", 0, "--optim.momentum", 0]
    for processes, cut in ((1, "none"), (3, micro_batch)):
        command = [*launcher_of(processes), *common, *flags, "--train.micro-batch", cut]
        succeed([*command, "--run-dir", f"run{processes}"], folder=tmp_path)
    one, three = (records(tmp_path / f"run{processes}", "train") for processes in (1, 3))
    assert [step["batch_digest"] for step in three] == [step["batch_digest"] for step in one]
    assert [step["loss"] for step in three] == pytest.approx([step["loss"] for step in one], rel=1e-4)

    torch.manual_seed(0)
    first = timm.create_model("test_convnext", in_chans=1, num_classes=10).state_dict()
    last_one, last_three = (load_file(tmp_path / f"run{count}/weights/last.safetensors") for count in (1, 3))
    moved = sum(float((last_one[name] - first[name]).square().sum()) for name in first) ** 0.5
    apart = sum(float((last_one[name] - last_three[name]).square().sum()) for name in first) ** 0.5
    assert moved > 1e-3
    assert apart < 1e-3 * moved


# Check 5: kill it anywhere.


@pytest.fixture(scope="session")
def killed(once, common):
    """`killed(processes)`: command and folder of a run whose process group was killed in mid-epoch."""

    def get(processes):
        command = [*launcher_of(processes), *common, "--run-dir", "run", "--data.workers", processes - 1]

        def make(folder):
            running = start(command, folder=folder, name="killed")
            assert wait_until(reaches(folder / "run", 10)), finish(running, within=1)
            if processes == 1:
                _start_beside(running, command)
            os.killpg(running.process.pid, signal.SIGKILL)
            assert finish(running).code == -signal.SIGKILL
            assert 10 <= steps_of(folder / "run")[-1] < EPOCH, "killed too late: not in the first epoch"

        return command, once(f"killed-{processes}", make)

    return get


def _start_beside(running, command):
    """A second start while the first one holds the run directory, frozen so that it cannot end meanwhile."""
    os.kill(running.process.pid, signal.SIGSTOP)
    refused(run(command, folder=running.folder, name="second"), "RESUME", "in use", str(running.process.pid))


def resumed_at(run_dir):
    name = records(run_dir, "start")[-1]["resumed_from"]
    return int(name.removeprefix("step-"))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_killed_run_goes_on_to_the_same_bits(killed, whole, processes, tmp_path):
    command, folder = killed(processes)
    shutil.copytree(folder / "run", tmp_path / "run")
    before = records(tmp_path / "run")
    done = succeed(command, folder=tmp_path)
    resumed, reference = tmp_path / "run", whole(processes)
    assert 0 < resumed_at(resumed) < EPOCH
    assert f"resumed at step {resumed_at(resumed)}" in done.out
    assert records(resumed)[:5] == before[:5]
    assert steps_of(resumed) == list(range(1, STEPS + 1))
    assert results(resumed) == results(reference)
    assert weights_sha(resumed) == weights_sha(reference)
    assert weights_sha(resumed, "best") == weights_sha(reference, "best")
    assert not (resumed / "failure.json").exists()


@pytest.mark.parametrize(("before", "after"), [(1, 2), (3, 1)])
def test_a_killed_run_goes_on_with_another_number_of_processes(killed, whole, before, after, tmp_path):
    _, folder = killed(before)
    shutil.copytree(folder / "run", tmp_path / "run")
    recorded = tmp_path / "run" / "config.yaml"
    succeed([*launcher_of(after), "--config", recorded, "--run-dir", "run"], folder=tmp_path)
    assert resumed_at(tmp_path / "run") > 0
    assert steps_of(tmp_path / "run") == list(range(1, STEPS + 1))
    assert digests(tmp_path / "run") == digests(whole(1))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits(common, whole, processes, tmp_path):
    command = [*launcher_of(processes), *common, "--run-dir", "run", "--checkpoint.every-steps", "none"]
    running = start(command, folder=tmp_path)
    assert wait_until(reaches(tmp_path / "run", 5)), finish(running, within=1)
    running.process.send_signal(signal.SIGTERM)
    done = finish(running, within=60)
    assert done.seconds < 20
    if processes == 1:  # torchrun has exit codes of its own
        assert done.code == 75
        assert done.err.strip().splitlines()[-1].startswith("FATAL code=STOPPED rank=0 ")
    assert done.code != 0
    assert done.err.count("FATAL ") == 1
    assert failure(tmp_path / "run")["code"] == "STOPPED"
    stopped_at = steps_of(tmp_path / "run")[-1]
    assert stopped_at < STEPS
    succeed(command, folder=tmp_path)
    assert resumed_at(tmp_path / "run") == stopped_at
    assert results(tmp_path / "run") == results(whole(processes))
    assert weights_sha(tmp_path / "run") == weights_sha(whole(processes))
    assert not (tmp_path / "run" / "failure.json").exists()


# What else has state: averaged weights, a schedule that looks at scores, layers that begin to learn, the
# mean loss of an epoch without a validation split, an update rule that counts its steps.
STATEFUL = {
    "averaged": [
        *("--train.ema", 0.9, "--model.freeze", "[conv1, layer1]", "--model.unfreeze", "{layer1: 9st}"),
        *("--optim.schedule", "{plateau: {patience: 0, factor: 0.5, threshold: 1, threshold_mode: abs}}"),
        *("--optim.name", "nadam", "--optim.warmup", 0, "--train.precision", "bf16"),
    ],
    "no validation": [
        "--data.val-split",
        "none",
        "--optim.name",
        "lamb",
        "--optim.clip-norm",
        1,
    ],
}


@pytest.mark.parametrize(("processes", "name"), [(2, "averaged"), (1, "no validation")])
def test_all_that_has_state_goes_on_to_the_same_bits(processes, name, common, tmp_path):
    """Stopped before and after layers thaw, in the first of four epochs and in the third."""
    command = [*launcher_of(processes), *common, *STATEFUL[name], "--train.global-batch", 160, "--run-dir"]
    succeed([*command, "whole"], folder=tmp_path)
    for stop in (4, 18):
        running = start([*command, "run"], folder=tmp_path)
        assert wait_until(reaches(tmp_path / "run", stop)), finish(running, within=1)
        running.process.send_signal(signal.SIGTERM)
        assert finish(running, within=60).code != 0
        assert failure(tmp_path / "run")["code"] == "STOPPED"
    succeed([*command, "run"], folder=tmp_path)
    assert len(records(tmp_path / "run", "start")) == 3
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    for which in ("last", "best"):
        assert weights_sha(tmp_path / "run", which) == weights_sha(tmp_path / "whole", which)
    if name == "averaged":
        rates = [step["lr"] for step in records(tmp_path / "run", "train")]
        drops = [*[1.0] * 16, *[0.5] * 8, *[0.25] * 6]
        assert rates == [0.002 * drop for drop in drops], "only the first evaluation is progress"


def test_stopping_accelerate_lets_its_one_process_save(common, whole, tmp_path):
    """`accelerate launch` dies of SIGTERM without a word to the process that it started."""
    command = [*ACCELERATE, str(RUN), *common, "--run-dir", "run", "--checkpoint.every-steps", "none"]
    running = start(command, folder=tmp_path)
    assert wait_until(reaches(tmp_path / "run", 5)), finish(running, within=1)
    running.process.send_signal(signal.SIGTERM)
    finish(running, within=30)
    assert failure(tmp_path / "run")["code"] == "STOPPED"
    stopped_at = steps_of(tmp_path / "run")[-1]
    succeed(command, folder=tmp_path)
    assert resumed_at(tmp_path / "run") == stopped_at
    assert results(tmp_path / "run") == results(whole(1))


def test_one_process_that_is_killed_ends_the_others_and_costs_nothing(common, whole, tmp_path):
    command = [*torchrun(2), *common, "--run-dir", "run"]
    running = start(command, folder=tmp_path)
    assert wait_until(reaches(tmp_path / "run", 10)), finish(running, within=1)
    victim = next(
        number
        for number in living(running.mark)
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{number}/environ").read_bytes()
    )
    os.kill(victim, signal.SIGKILL)
    done = finish(running, within=60)
    assert done.code != 0
    assert done.seconds < 20
    assert failure(tmp_path / "run")["code"] == "CRASH"
    succeed(command, folder=tmp_path)
    assert results(tmp_path / "run") == results(whole(2))
    assert weights_sha(tmp_path / "run") == weights_sha(whole(2))


def test_the_newest_checkpoint_damaged_costs_only_the_steps_behind_the_one_before(whole, finished, common):
    newest, before = sorted((finished / "checkpoints").glob("step-*"), reverse=True)[:2]
    assert (newest.name, before.name) == ("step-00000030", "step-00000028")
    with (newest / "model.safetensors").open("r+b") as file:
        file.seek(100_000)
        byte = file.read(1)[0]
        file.seek(100_000)
        file.write(bytes([byte ^ 1]))
    done = succeed([*PYTHON, *common, "--run-dir", "run"], folder=finished.parent)
    assert "step-00000030 is not whole" in done.out + done.err
    assert resumed_at(finished) == 28
    assert results(finished) == results(whole(1))
    assert weights_sha(finished) == weights_sha(whole(1))


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew_behind_its_owners_back(finished, common):
    before = (finished / "metrics.jsonl").read_bytes()
    damaged = sorted((finished / "checkpoints").glob("step-*"))
    for checkpoint in damaged:
        (checkpoint / "state.json").write_text("{}")
    done = run([*PYTHON, *common, "--run-dir", "run"], folder=finished.parent)
    refused(done, "RESUME", "no checkpoint to go on from", "--fresh", lines=2 + len(damaged))
    assert (finished / "metrics.jsonl").read_bytes() == before
    assert sorted((finished / "checkpoints").glob("step-*")) == damaged


# Check 6: every sample once, with a certificate.


def evaluation(processes, run_dir, *flags, folder):
    command = [*launcher_of(processes)[:-1], RUN, "evaluate", "--run-dir", run_dir, *flags]
    done = succeed(command, folder=folder, name=f"evaluate-{processes}")
    found = re.findall(r"^(?!digest)([a-z]\w*) +([0-9][-+.e0-9]*)$", done.out, re.MULTILINE)
    return {name: float(value) for name, value in found}, done


def certified(record, samples):
    proof = record["certificate"]
    return (proof["expected"], proof["seen"], proof["unique"]) == (samples, samples, samples)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_evaluation_while_training_is_certified(whole, digits, processes):
    found = records(whole(processes), "eval")
    assert [one["step"] for one in found] == [EPOCH, STEPS]
    assert all(certified(one, 359) for one in found)
    assert {one["certificate"]["digest"] for one in found} == {read_dataset(digits).split("val").keys_digest}


def test_evaluate_prints_the_accuracy_of_the_records_on_any_number_of_processes(whole, tmp_path):
    reference = max(records(whole(2), "eval"), key=lambda one: one["metrics"]["accuracy"])["metrics"]
    shutil.copytree(whole(2), tmp_path / "run")
    for processes in (1, 2, 3):
        found, done = evaluation(processes, "run", folder=tmp_path)
        assert found == reference
        assert "359 of 359 samples" in done.out
    (written,) = tmp_path.glob("run/**/*evaluation*.json")
    assert certified(json.loads(written.read_text()), 359)
    assert results(tmp_path / "run") == results(whole(2)), "an evaluation is no part of the run's records"


@pytest.mark.parametrize(("split", "samples", "trained_on"), [("val", 7, 3), ("test", 1, 2)])
def test_splits_smaller_than_a_batch_or_the_processes_are_certified(
    small, split, samples, trained_on, tmp_path
):
    split_flags = ["--data.val-split", split]
    command = [*launcher_of(trained_on), *flags_for_small(small), *split_flags, "--train.max-steps", 3]
    succeed([*command, "--run-dir", "run"], folder=tmp_path)
    (record,) = records(tmp_path / "run", "eval")
    assert certified(record, samples)
    for processes in {1, 2, 3} - {trained_on}:
        found, done = evaluation(processes, "run", folder=tmp_path)
        assert found == record["metrics"]
        assert f"{samples} of {samples} samples" in done.out


# Check 7: what a user takes away.


def test_weights_load_strictly_into_the_bare_network_with_what_model_json_says(whole, digits):
    import timm
    from safetensors.torch import load_file

    about = json.loads((whole(2) / "weights" / "model.json").read_text())
    dataset = read_dataset(digits)
    assert about["task"] == "multiclass"
    assert about["classes"] == list(dataset.classes) == [str(digit) for digit in range(10)]
    network = {"library": "timm", "name": "test_resnet", "arguments": {}, "channels": 1, "outputs": 10}
    assert about["network"] == network
    assert about["image"] == {"mode": "L", "mean": list(dataset.mean), "std": list(dataset.std)}
    for name in ("best", "last"):
        network = timm.create_model("test_resnet", in_chans=1, num_classes=10)
        network.load_state_dict(load_file(whole(2) / "weights" / f"{name}.safetensors"), strict=True)


def test_the_run_directory_holds_no_pickle_and_nothing_unknown(whole):
    files = [path for path in whole(2).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".yaml", ".jsonl", ".json", ".safetensors", ".png", ""}
    assert [path.name for path in files if path.suffix == ""] == ["lock"]
    for path in files:
        content = path.read_bytes()
        assert not content.startswith((b"\x80", b"PK", b"\x1f\x8b")), path
        if path.suffix == ".safetensors":
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            assert header.keys() - {"__metadata__"}, path
        elif path.suffix == ".png":
            assert content.startswith(b"\x89PNG"), path
        else:
            content.decode("utf-8")


def test_the_recorded_configuration_is_what_print_config_prints(whole, common):
    command = [*PYTHON, *common, "--data.workers", 1, "--print-config"]
    printed_now = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    assert printed_now.stdout == (whole(2) / "config.yaml").read_text()


def test_records_carry_the_fields_that_scripts_read(whole):
    run_dir = whole(2)
    assert records(run_dir)[0]["kind"] == "start"
    assert (
        records(run_dir)[0].items() >= {"step": 0, "processes": 2, "workers": 1, "resumed_from": None}.items()
    )
    for number, record in enumerate(records(run_dir, "train")):
        assert record.keys() == {
            *["kind", "step", "epoch", "samples", "loss", "lr", "batch_digest", "seconds"]
        }
        assert (record["step"], record["epoch"]) == (number + 1, number // EPOCH)
        assert record["samples"] == 64 * (number + 1)
    for record in records(run_dir, "eval"):
        assert record.keys() == {"kind", "step", "epoch", "metrics", "classes", "certificate", "seconds"}
        assert {len(scores) for scores in record["classes"].values()} == {10}
        assert record["certificate"].keys() == {"expected", "seen", "unique", "digest"}


# Going on from a run directory, or not.


def test_a_changed_learning_rate_is_refused_by_name_unless_it_is_allowed(whole, finished, common):
    command = [*PYTHON, *common, "--run-dir", "run", "--train.max-steps", 31, "--optim.lr", "0.005"]
    done = run(command, folder=finished.parent)
    refused(done, "RESUME", "optim.lr: 0.002 -> 0.005", "--allow-config-change")
    assert (finished / "config.yaml").read_text() == (whole(1) / "config.yaml").read_text()
    succeed([*command, "--allow-config-change"], folder=finished.parent)
    assert steps_of(finished) == list(range(1, 32))
    assert records(finished, "train")[-1]["lr"] > 2 * records(finished, "train")[-2]["lr"]


def test_keys_that_change_nothing_that_is_learned_may_change(finished, common):
    free = ["--data.workers", 3, "--train.micro-batch", 16, "--log.every-steps", 2, "--train.max-steps", 34]
    done = succeed([*PYTHON, *common, "--run-dir", "run", *free, "--quiet"], folder=finished.parent)
    assert done.out == ""
    assert steps_of(finished) == [*range(1, 31), 32, 34]


def test_another_data_set_is_refused(finished, digits, common):
    other = finished.parent / "digits"
    shutil.copytree(digits, other)
    described = json.loads((other / "dataset.json").read_text())
    described["splits"]["train"]["shards"].reverse()
    (other / "dataset.json").write_text(json.dumps(described))
    command = [*PYTHON, *common, "--run-dir", "run", "--data.root", other]
    done = run(command, folder=finished.parent)
    refused(done, "RESUME", "not the data set of this run", "the same keys, in other files", lines=3)


def test_fresh_moves_the_old_run_aside_whole(whole, finished, common):
    flags = ["--run-dir", "run", "--fresh", "--train.max-steps", 2, "--seed", 5]
    done = succeed([*PYTHON, *common, *flags], folder=finished.parent)
    (aside,) = finished.parent.glob("run.old*")
    assert str(aside.name) in done.out
    assert results(aside) == results(whole(1))
    assert weights_sha(aside) == weights_sha(whole(1))
    assert [one["resumed_from"] for one in records(finished, "start")] == [None]
    assert steps_of(finished) == [1, 2]


def test_a_finished_run_started_again_changes_nothing(whole, finished, common):
    succeed([*PYTHON, *common, "--run-dir", "run", "--data.workers", 0], folder=finished.parent)
    assert results(finished) == results(whole(1))
    assert weights_sha(finished) == weights_sha(whole(1))


def test_a_dry_run_writes_nothing_and_says_what_would_be(digits, tmp_path):
    inside = tmp_path / "cwd"
    inside.mkdir()
    before = sorted(digits.rglob("*"))
    flags = ["--dry-run", "--data.root", digits, "--model.name", "test_resnet", "--run-dir", "run"]
    done = succeed([*PYTHON, *flags], folder=tmp_path, cwd=inside)
    assert list(inside.iterdir()) == []
    assert sorted(digits.rglob("*")) == before
    for said in ("name: test_resnet", "parameters", "1,438", "22 steps an epoch", "step 2", "GiB"):
        assert said in done.out


# Check 8: what is wrong is said in two lines, or with one traceback.

REFUSED = {
    "a misspelt flag": (["--train.epoch", 3], "USAGE", ["--train.epochs"]),
    "a negative batch size": (["--train.global-batch", -64], "CONFIG", ["--train.global-batch", "-64"]),
    "a missing data folder": (["--data.root", "nowhere"], "DATA", ["nowhere"]),
    "an empty data folder": (["--data.root", "empty"], "DATA", ["dataset.json"]),
    "an unknown network": (["--model.name", "resnet19"], "CONFIG", ["did you mean resnet18?"]),
    "a batch larger than the data": (["--train.global-batch", 10**30], "CONFIG", ["1438"]),
    "one sample a pass with BatchNorm": (["--train.micro-batch", 1], "CONFIG", ["BatchNorm", "1 sample"]),
    "a missing split": (["--data.val-split", "vall"], "DATA", ["vall", "val"]),
    "a way to a shell": (["--data.root", "pipe:touch canary"], "UNSAFE", ["pipe:", "not allowed"]),
    "too much mixing": (["--data.mixup", 5], "CONFIG", ["--data.mixup", "5", "4"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_costs_two_lines_and_exit_code_2(name, digits, tmp_path):
    flags, code, words = REFUSED[name]
    (tmp_path / "empty").mkdir()
    basis = ["--run-dir", "run", "--data.root", digits, "--model.name", "test_resnet"]
    done = run([*PYTHON, *basis, *flags], folder=tmp_path)
    refused(done, code, *words)


def test_a_run_directory_that_cannot_be_written_is_a_fault_of_storage(digits, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    done = run([*PYTHON, "--data.root", digits, "--run-dir", "file"], folder=tmp_path)
    assert done.code == 74
    what, fatal = done.err.strip().splitlines()
    assert "'file'" in what
    assert fatal.startswith("FATAL code=STORAGE rank=0 ")


def test_a_mistake_before_the_first_checkpoint_binds_nobody(common, tmp_path):
    command = [*PYTHON, *common, "--run-dir", "run", "--train.max-steps", 2]
    done = run([*command, "--model.pretrained", "nowhere.pth"], folder=tmp_path)
    refused(done, "CONFIG", "there is no file 'nowhere.pth'")
    assert failure(tmp_path / "run")["code"] == "CONFIG"
    succeed(command, folder=tmp_path)
    assert steps_of(tmp_path / "run") == [1, 2]
    assert not (tmp_path / "run" / "failure.json").exists()


@pytest.mark.parametrize("mode", ["evaluate", "predict"])
def test_what_went_wrong_before_keeps_no_later_start_silent(mode, finished):
    for number in range(2):
        words = [
            mode,
            "--run-dir",
            "run",
            "--weights",
            f"{number}.safetensors",
            "--predict.source",
            "nowhere",
        ]
        refused(run([*PYTHON, *words], folder=finished.parent), "DATA", f"cannot read '{number}.safetensors'")
        assert f"{number}.safetensors" in failure(finished)["what"]


def test_several_processes_report_a_mistake_once(digits, tmp_path):
    command = [*torchrun(2), "--run-dir", "run", "--data.root", digits, "--model.name", "resnet19"]
    done = run(command, folder=tmp_path)
    assert done.code != 0
    assert done.err.count("FATAL code=CONFIG") == 1
    assert done.err.count("timm has no network") == 1


# What readers meet: broken samples, a kill, a server; what is mixed and balanced.


def damaged(small, folder, split, row):
    """A copy of the small data set in which a picture of the split's first shard is broken; and its place."""
    shutil.copytree(small, folder / "packed")
    shard = read_dataset(small).split(split).shards[0]
    index = read_shard_index(index_path(small / shard.name), shard)
    offset = int(index.offset[row, index.extensions.index("jpg")])
    with (folder / "packed" / shard.name).open("r+b") as file:
        file.seek(offset + 2)
        file.write(bytes(60))
    return folder / "packed", {"shard": shard.name, "member": index.key(row), "offset": offset}


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_broken_sample_ends_the_run_and_is_named_with_its_place(small, tmp_path, split):
    """In training because one is more than a thousandth of 36, in validation because all of it must count."""
    packed, place = damaged(small, tmp_path, split, 1)
    done = run([*torchrun(2), *flags_for_small(packed), "--run-dir", "run"], folder=tmp_path)
    assert done.code != 0
    (line,) = re.findall(r"^FATAL .*$", done.err, re.MULTILINE)
    said = {"code": "DATA", **place}
    assert all(f"{name}={value} " in line for name, value in said.items()), line
    assert "run.py" not in done.err.partition("FATAL")[0], "no traceback of ours"
    assert failure(tmp_path / "run")["code"] == "DATA"


def test_broken_samples_that_are_allowed_are_left_out_alike_on_any_number_of_processes(small, tmp_path):
    packed, place = damaged(small, tmp_path, "train", 4)
    flags = [*flags_for_small(packed), "--data.max-bad", 0.1, "--debug.batch-digest", "pixels"]
    for processes in (1, 3):
        command = [*launcher_of(processes), *flags, "--run-dir", f"run{processes}"]
        done = succeed(command, folder=tmp_path)
        assert "takes its place (1 so far, at most 3)" in done.out
    one, three = (tmp_path / f"run{processes}" for processes in (1, 3))
    assert digests(one) == digests(three)
    (line,) = [json.loads(text) for text in (one / "bad_samples.jsonl").read_text().splitlines()]
    assert (one / "bad_samples.jsonl").read_text() == (three / "bad_samples.jsonl").read_text()
    assert [line[name] for name in ("shard", "key", "offset")] == list(place.values())
    assert "bytes that were packed" in line["exception"]
    # Its neighbour stands in for it in every epoch, and occurs a second time where it belongs itself.
    assert steps_of(one) == list(range(1, 19))


def test_a_reader_that_is_killed_in_mid_run_changes_nothing(whole, common, tmp_path):
    command = [*PYTHON, *common, "--run-dir", "run", "--data.workers", 2, "--data.worker-kind", "processes"]
    running = start(command, folder=tmp_path)
    assert wait_until(reaches(tmp_path / "run", 3)), finish(running, within=1)
    # Readers are forks of the process; beside them there is the program that watches over its lock.
    own = [number for number in living(running.mark) if number != running.process.pid]
    readers = [number for number in own if b"run.py" in Path(f"/proc/{number}/cmdline").read_bytes()]
    assert len(readers) == 2
    os.kill(readers[0], signal.SIGKILL)
    assert finish(running).code == 0
    assert results(tmp_path / "run") == results(whole(1))
    assert weights_sha(tmp_path / "run") == weights_sha(whole(1))


def test_what_is_mixed_and_balanced_is_the_same_on_any_topology(common, whole, tmp_path):
    flags = ["--data.balance", 1, "--data.mixup", 0.2, "--data.cutmix", 1, "--train.max-steps", 6]
    threads = ["--data.workers", 3, "--data.worker-kind", "threads", "--train.micro-batch", 5]
    succeed([*PYTHON, *common, *flags, "--run-dir", "one"], folder=tmp_path)
    succeed([*torchrun(3), *common, *flags, *threads, "--run-dir", "three"], folder=tmp_path)
    assert digests(tmp_path / "one") == digests(tmp_path / "three")
    assert not set(digests(tmp_path / "one")) & set(digests(whole(1)))
    losses = [[step["loss"] for step in records(tmp_path / name, "train")] for name in ("one", "three")]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-2)  # BatchNorm sees its share only


def test_a_data_set_behind_a_url_trains_as_the_one_in_the_folder_does(small, tmp_path):
    handler = partial(SimpleHTTPRequestHandler, directory=str(small))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name, root, flags in (("url", url, ["--data.cache", "cache"]), ("folder", small, [])):
            command = [*torchrun(2), *flags_for_small(root), *flags, "--debug.batch-digest", "pixels"]
            succeed([*command, "--run-dir", name], folder=tmp_path)
        server.shutdown()
    assert results(tmp_path / "url") == results(tmp_path / "folder")
    assert sorted(path.suffix for path in (tmp_path / "cache").rglob("*.tar"))


STRIKE = """
import ctypes, os, pathlib, threading, time

def strike(main=threading.main_thread().ident):
    metrics = pathlib.Path("run/metrics.jsonl")
    while not (metrics.exists() and metrics.read_text().count('"kind": "train"') > 5):
        time.sleep(0.01)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), ctypes.py_object(ZeroDivisionError))

if os.environ.get("RANK") == "1":
    threading.Thread(target=strike, daemon=True).start()
"""


def test_an_exception_in_one_process_ends_all_with_its_traceback_alone(common, tmp_path):
    """Python runs sitecustomize.py in every process: here it raises in the second one, in mid-training."""
    (tmp_path / "sitecustomize.py").write_text(STRIKE)
    command = [*torchrun(2), *common, "--run-dir", "run"]
    done = run(command, folder=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.code != 0
    ours = [
        part for part in done.err.split("Traceback (most recent call last)")[1:] if f'{RUN}", line' in part
    ]
    assert len([part for part in ours if "ZeroDivisionError" in part]) == 1, done.err
    assert len(ours) == 1, done.err
    (line,) = re.findall(r"^FATAL .*$", done.err, re.MULTILINE)
    assert re.match(r"FATAL code=CRASH rank=1 host=\S+ step=\d+ hint=", line)
    content = failure(tmp_path / "run")
    assert (content["code"], content["rank"]) == ("CRASH", 1)
    assert "ZeroDivisionError" in content["what"]


def test_a_loss_that_is_not_a_number_ends_the_run_with_its_own_code(common, tmp_path):
    done = run([*PYTHON, *common, "--run-dir", "run", "--optim.lr", "1e30"], folder=tmp_path)
    assert done.code == 76
    assert len(done.err.strip().splitlines()) == 2
    assert done.err.strip().splitlines()[-1].startswith("FATAL code=NONFINITE rank=0 ")
    content = failure(tmp_path / "run")
    assert content["code"] == "NONFINITE"
    assert all(np.isfinite(one["loss"]) for one in records(tmp_path / "run", "train"))
