"""What only a GPU can show: the same pixels as on the CPU, half precision, and a scaler that is resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from data_pipeline.index import read_dataset
from data_pipeline.plan import Plan, training_work
from data_pipeline.produce import Recipe
from data_pipeline.store import Folder
from data_pipeline.stream import stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RUN = Path(__file__).parent.parent / "training" / "run.py"


@pytest.fixture
def train(tmp_path):
    """`train(name, *flags)`: the records of a run of a few steps on one process; `cpu` hides the GPU."""

    def call(name, *flags, cpu=False):
        words = [sys.executable, RUN, "--run-dir", name, "--model.name", "test_resnet", "--quiet", *flags]
        hidden = {"ACCELERATE_USE_CPU": "true"} if cpu else {}
        subprocess.run(words, cwd=tmp_path, env=os.environ | hidden, check=True, timeout=280)
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    return call


def of_kind(kind, records):
    return [record for record in records if record["kind"] == kind]


def test_the_pixels_on_the_gpu_are_those_on_the_cpu_bit_for_bit(train):
    flags = ("--train.max-steps", "6", "--debug.batch-digest", "pixels")
    gpu, cpu = train("gpu", *flags), train("cpu", *flags, cpu=True)
    assert (gpu[0]["device"], cpu[0]["device"]) == ("cuda", "cpu")
    digests = [[record["batch_digest"] for record in of_kind("train", records)] for records in (gpu, cpu)]
    assert digests[0] == digests[1]
    assert of_kind("eval", gpu)[0]["certificate"] == of_kind("eval", cpu)[0]["certificate"]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_learns_and_resumes_with_its_scaler(train, tmp_path, precision):
    flags = ("--train.precision", precision, "--train.epochs", "4")
    train("run", *flags, "--train.max-steps", "44")
    state = json.loads((tmp_path / "run/checkpoints/step-00000044/state.json").read_text())
    assert (state["scaler"] is not None) == (precision == "fp16")
    records = train("run", *flags)
    assert of_kind("start", records)[1]["resumed_from"] == "step-00000044"
    assert [record["step"] for record in of_kind("train", records)] == list(range(1, 89))
    assert of_kind("eval", records)[-1]["metrics"]["accuracy"] > 0.6


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_pinned_batches_that_are_copied_without_waiting_arrive_as_they_were_made(photo_dataset, kind):
    dataset = read_dataset(photo_dataset)
    transforms = (("random_resized_crop", {"size": 64}),)
    recipe = Recipe(Folder(photo_dataset), dataset, "train", transforms, seed=0, pinned=True)
    sizes = dataset.split("train").shard_samples
    plan = Plan(sizes, seed=0, global_batch=12, lanes=4, shuffle_block=8)
    work = partial(training_work, plan, steps=range(40), process=0, processes=1, micro_batch=12)
    plain = stream(replace(recipe, pinned=False), work, workers=0, prefetch=1)
    expected = [batch.images.sum(dtype=torch.int64).item() for batch in plain]
    copies = []
    for batch in stream(recipe, work, workers=2, prefetch=2, kind=kind):
        assert batch.images.is_pinned()
        copies.append(batch.images.to("cuda", non_blocking=True))
        torch.cuda._sleep(1_000_000)  # the copies queue up behind work, as they do in training
    assert [one.sum(dtype=torch.int64).item() for one in copies] == expected


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "nadam", "lamb", "lion", "muon"])
@pytest.mark.parametrize("clip", ["clip-norm", "clip-value", "clip-adaptive"])
def test_every_update_rule_goes_on_to_the_same_losses_with_a_scaler_and_clipping(train, name, clip):
    flags = (
        "--train.precision",
        "fp16",
        "--optim.name",
        name,
        f"--optim.{clip}",
        "0.5",
        "--optim.lr",
        "0.001",
    )
    flags = (*flags, "--train.epochs", "1", "--checkpoint.every-steps", "4")
    whole = of_kind("train", train("whole", *flags, "--train.max-steps", "12"))
    train("run", *flags, "--train.max-steps", "6")
    resumed = of_kind("train", train("run", *flags, "--train.max-steps", "12"))
    assert [one["loss"] for one in resumed] == pytest.approx([one["loss"] for one in whole], rel=1e-2)


def test_a_compiled_network_in_nhwc_learns_what_a_plain_one_does(train):
    flags = ("--train.max-steps", "8", "--train.ema", "0.5")
    plain = of_kind("train", train("plain", *flags))
    fast = of_kind("train", train("fast", *flags, "--model.compile", "--model.channels-last"))
    assert [one["loss"] for one in fast] == pytest.approx([one["loss"] for one in plain], rel=2e-2)


def saved(run_dir):
    """SHA-256 of each tensor file of the newest checkpoint."""
    newest = max((run_dir / "checkpoints").glob("step-*"))
    files = json.loads((newest / "MANIFEST.json").read_text())["files"]
    return {name: one["sha256"] for name, one in files.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_exact_mode_repeats_its_bits_and_resumes_to_them(train, tmp_path, precision):
    flags = ("--train.exact", "true", "--train.precision", precision, "--train.ema", "0.9")
    flags = (*flags, "--train.epochs", "1", "--optim.clip-norm", "1")
    train("whole", *flags, "--train.max-steps", "10")
    train("again", *flags, "--train.max-steps", "10")
    train("run", *flags, "--train.max-steps", "5")
    train("run", *flags, "--train.max-steps", "10")
    assert saved(tmp_path / "whole") == saved(tmp_path / "again") == saved(tmp_path / "run")


def test_without_tf32_the_first_losses_are_those_of_the_cpu(train):
    flags = ("--train.max-steps", "3", "--optim.lr", "0.0001")
    gpu, cpu = (of_kind("train", train(name, *flags, cpu=name == "cpu")) for name in ("gpu", "cpu"))
    assert [one["loss"] for one in gpu] == pytest.approx([one["loss"] for one in cpu], rel=1e-4)


def test_the_seconds_of_a_step_add_up_on_the_stream_of_the_device(train):
    records = of_kind("train", train("run", "--train.max-steps", "12"))
    assert all(one["seconds"]["compute"] > 0 for one in records[2:])
    assert all(0 <= spent < 60 for one in records for spent in one["seconds"].values())


def test_two_processes_on_one_gpu_are_refused_with_their_numbers_and_the_gpu(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*launcher, RUN, "--run-dir", "run", "--train.max-steps", "1"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(
        words, cwd=tmp_path, env=env, check=False, timeout=120, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "error: processes 0 and 1 on " in done.stderr
    assert " use the same GPU: " in done.stderr
    assert done.stderr.count("FATAL code=USAGE rank=0 ") == 1


def test_a_run_says_once_which_gpu_it_uses(tmp_path):
    words = [sys.executable, RUN, "--run-dir", "run", "--train.max-steps", "1"]
    done = subprocess.run(words, cwd=tmp_path, check=True, timeout=280, capture_output=True, text=True)
    assert done.stdout.count(f"          {torch.cuda.get_device_name(0)}, ") == 1
