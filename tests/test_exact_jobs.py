"""Whole runs in exact mode: one SHA-256 of weights, optimizer and averages on 1, 2 and 4 processes.

And after a stop and resume between them, with BatchNorm, dropout, stochastic depth, AdamW, clipping, EMA.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.digits import ensure_digits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parent.parent
TORCHRUN = Path(sys.executable).parent / "torchrun"
STEPS = 9
FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors")
DEADLINE = 120


@pytest.fixture(scope="session")
def flags(shared):
    """A small network with everything that could depend on who computes what."""
    ensure_digits(shared / "digits")
    values = {
        "--data.root": shared / "digits",
        "--data.workers": 0,
        "--model.name": "test_resnet",
        "--model.arguments": "{drop_rate: 0.3, drop_path_rate: 0.2}",
        "--train.exact": "true",
        "--train.max-steps": STEPS,
        "--train.ema": 0.9,
        "--optim.name": "adamw",
        "--optim.clip-norm": 0.5,
        "--debug.batch-digest": "pixels",
    }
    return [str(word) for pair in values.items() for word in pair]


def start(processes, folder, flags, **variables):
    """A run in `folder`/run on so many processes, in a session of its own."""
    script = [str(ROOT / "training" / "run.py"), "--run-dir", "run", *flags]
    command = [sys.executable] if processes == 1 else [str(TORCHRUN), f"--nproc_per_node={processes}"]
    known = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "LANG") if key in os.environ}
    env = {**known, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [*command, *script],
        cwd=folder,
        env={name: value for name, value in env.items() if value},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process, code=0):
    """What it said, once it has ended as it should; nothing of it is left."""
    try:
        out, err = process.communicate(timeout=DEADLINE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == code, out + err
    return out, err


def records(folder, kind):
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [one for one in map(json.loads, lines) if one["kind"] == kind]


def told(folder):
    """What the records of steps and evaluations say, but for the seconds."""
    both = records(folder, "train") + records(folder, "eval")
    return [{name: value for name, value in one.items() if name != "seconds"} for one in both]


def bits(folder, step=STEPS):
    checkpoint = folder / "run" / "checkpoints" / f"step-{step:08d}"
    return [hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in FILES]


@pytest.fixture(scope="session")
def unbroken(once, flags):
    """A run on one process; plain Python, which nobody has told how many threads to use."""
    folder = once(
        "exact-unbroken", lambda folder: said(folder, finish(start(1, folder, flags, OMP_NUM_THREADS="")))
    )
    return folder


def said(folder, words):
    (folder / "said.txt").write_text("".join(words))


@pytest.fixture(scope="session")
def stopped(once, flags):
    """A run on two processes that was asked to stop in the middle."""

    def make(folder):
        process = start(2, folder, [*flags, "--checkpoint.every-steps", "3"])
        end = time.monotonic() + DEADLINE
        while not (folder / "run" / "checkpoints" / "step-00000003").exists() and time.monotonic() < end:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=DEADLINE)

    return once("exact-stopped", make)


@pytest.mark.parametrize("processes", [2, 4])
def test_a_run_has_the_bits_of_one_process(processes, unbroken, flags, tmp_path):
    out, err = finish(start(processes, tmp_path, flags))
    assert bits(tmp_path) == bits(unbroken)
    assert told(tmp_path) == told(unbroken)
    first, other = (unbroken / "said.txt").read_text(), out
    digests = [line for line in other.splitlines() if line.startswith("sha256")]
    assert len(digests) == 1
    assert digests[0] in first
    assert "Warning" not in err


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_run_stopped_on_two_processes_goes_on_with_the_same_bits(
    processes, stopped, unbroken, flags, tmp_path
):
    done = len(records(stopped, "train"))
    assert 3 <= done < STEPS
    shutil.copytree(stopped / "run", tmp_path / "run")
    finish(start(processes, tmp_path, flags))
    assert [one["processes"] for one in records(tmp_path, "start")] == [2, processes]
    assert bits(tmp_path) == bits(unbroken)
    assert told(tmp_path) == told(unbroken)


def test_other_threads_and_other_numbers_of_processes_are_refused(stopped, flags, tmp_path):
    shutil.copytree(stopped / "run", tmp_path / "run")
    threads, three = start(1, tmp_path, flags, OMP_NUM_THREADS="2"), start(3, tmp_path / "three", flags)
    _, err = finish(threads, code=2)
    assert "threads was 1, is 2" in err
    assert 'FATAL code=RESUME rank=0 hint="set OMP_NUM_THREADS=1; ' in err
    out, err = three.communicate(timeout=DEADLINE)
    assert err.count("3 processes cannot share the 8 grains") == 1, out + err
    assert "FATAL code=CONFIG" in err
    assert "start 1, 2, 4 or 8 processes" in err


# Two steps each on one process and on two, in processes that stay: what they leave must be equal.
VARIANTS = """
import hashlib, sys, torch
from accelerate import Accelerator
from data_pipeline.fault import UserError
from training.assembly import PRECISIONS, assemble
from training.command import read_request
from training.exact.conditions import fix_arithmetic
from training.gradients import accumulate
from training.reading import open_dataset, training_batches
from training.state import Progress
from training.step import take_step

fix_arithmetic(cpu=True)
labels, masks, digits = sys.argv[1:]
SIZE = ["--data.train-transforms", "[{resize_to: {height: 32, width: 32}}]"]
BOTH = ["--data.workers", "0", "--train.exact", "true", "--train.global-batch", "12", "--run-dir", "unused"]
CASES = {
    "areas, bf16": ["--data.root", masks, "--task", "segmentation", "--model.name", "unet", *SIZE,
        "--model.arguments", "{width: 4, depth: 2}", "--loss", "{bce: 0.5, dice: 0.5}",
        "--train.precision", "bf16", "--train.grain", "3", "--data.cutmix", "1"],
    "missing labels, Muon, activations computed twice": ["--data.root", labels, "--task", "multilabel", *SIZE,
        "--model.name", "test_resnet", "--model.grad-checkpointing", "true", "--model.arguments",
        "{drop_path_rate: 0.2}", "--optim.name", "muon", "--optim.clip-adaptive", "0.01"],
    "thawing, mixed": ["--data.root", digits, "--model.name", "test_resnet", "--model.freeze", "[body]",
        "--model.unfreeze", "{body: 1}", "--optim.name", "sgd", "--data.mixup", "1", "--train.ema", "0.9",
        "--model.channels-last", "true", "--train.grain", "2"],
}

def other_weights_are_refused(job, batches):
    job.grain_sums = None
    with torch.no_grad():
        job.network.fc.bias[0] += job.accelerator.process_index
    try:
        accumulate(job, batches, 2)
    except UserError as error:
        assert "process 1 differs from process 0: fc.bias" in error.what, error.what
    else:
        raise AssertionError("nobody noticed")
    with torch.no_grad():
        job.network.fc.bias[0] -= job.accelerator.process_index


for name, words in CASES.items():
    request = read_request([*words, *BOTH])
    dataset = open_dataset(request.config, learning=True)
    accelerator = Accelerator(cpu=True, mixed_precision=PRECISIONS[request.config.train.precision])
    job = assemble(request, accelerator, dataset, checkpoint=None, progress=Progress())
    steps = range(3)
    batches = training_batches(job.config, dataset, job.plan, accelerator, steps=steps)
    job.learn()
    digest = hashlib.sha256()
    for step in range(2):
        if step in job.freezing.thaw_steps:
            job.thaw(step)
        report = take_step(job, batches, step).report()
        digest.update(report.sums.numpy().tobytes())
    if job.average and accelerator.num_processes > 1:
        other_weights_are_refused(job, batches)
    batches.close()
    average = job.average.state_dict() if job.average else {}
    for tensor in [*job.network.state_dict().values(), *average.values()]:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    if accelerator.is_main_process:
        print(name, digest.hexdigest())
    accelerator.state._reset_state(reset_partial_state=False)
accelerator.wait_for_everyone()
accelerator.end_training()
"""


def test_other_losses_optimizers_and_precisions_have_the_same_bits_too(
    multilabel_dataset, segmentation_dataset, flags, tmp_path
):
    script = tmp_path / "variants.py"
    script.write_text(VARIANTS)
    roots = [str(multilabel_dataset), str(segmentation_dataset), flags[1]]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(*command):
        done = subprocess.run(
            [*command, script, *roots],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    alone = run(sys.executable)
    assert len({line.split()[-1] for line in alone}) == 3
    assert run(TORCHRUN, "--nproc_per_node=2") == alone
