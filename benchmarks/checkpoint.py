"""Measures what a checkpoint costs: seconds of blocked training, bytes a second, and slower steps meanwhile.

    python benchmarks/checkpoint.py [--megabytes 400] [--rounds 7] [--folder DIR]

The state is that of an AdamW run: weights and two running means of the same shapes. Every round does all of
it, in an order of its own, so that a noisy machine troubles all alike; a ratio is taken within a round, and
the table shows medians. The disk is that of --folder.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one training thread: the other core is the writer's

import torch

from training.checkpoints.protocol import write_checkpoint
from training.checkpoints.retention import Retention
from training.checkpoints.snapshot import layout_of
from training.checkpoints.tensor_file import write_tensors
from training.checkpoints.writer import CheckpointWriter, Plan

STEP = 0.02  # seconds of a training step, roughly
GOALS = {"blocked": 0.15, "throughput": 0.9, "steps": 1.05}


def state_of(megabytes):
    """Files of tensors, 2.4 M numbers in each of the largest, as in a convolutional network."""
    wide = 1536
    layers = max(1, round(megabytes * 1e6 / (3 * 4 * wide * (wide + 1))))
    shapes = {f"{one}.{kind}": shape for one in range(layers) for kind, shape in kinds(wide)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    means = {f"{mean}/{name}": torch.randn(shapes[name]) for mean in ("m", "v") for name in shapes}
    return {"model.safetensors": weights, "optimizer.safetensors": means}


def kinds(wide):
    return (("weight", (wide, wide)), ("bias", (wide,)))


class Training:
    """Steps of one thread: a product of matrices, and small operations as an optimizer launches them."""

    def __init__(self):
        self.left, self.right = torch.randn(384, 384), torch.randn(384, 384)
        self.small = torch.zeros(64)
        self.products = 20
        self.products = max(1, round(20 * STEP / min(self.step() for _ in range(20))))

    def step(self):
        began = time.perf_counter()
        for _ in range(self.products):
            torch.mm(self.left, self.right)
            self.small.add_(1.0)
        return time.perf_counter() - began

    def steps(self, until):
        spent = []
        while not until(len(spent)):
            spent.append(self.step())
        return spent


def torch_save(folder, state):
    """What everyone writes into the loop."""
    began = time.perf_counter()
    with (folder / "checkpoint.pt").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def plain(folder, state):
    """The same bytes, written and pushed to the disk, and nothing else."""
    path = folder / "plain"
    views = [
        tensor.view(-1).view(torch.uint8).numpy().data for one in state.values() for tensor in one.values()
    ]
    began = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for view in views:
        rest = view
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)
    os.close(descriptor)
    return time.perf_counter() - began


def ours_written(folder, state):
    """Two safetensors files with their checksums, pushed to the disk."""
    began = time.perf_counter()
    write_tensors(folder, state)
    return time.perf_counter() - began


def ours_committed(folder, state):
    """A whole checkpoint: manifest, reading back, renaming."""
    began = time.perf_counter()
    write_checkpoint(folder, 1, state, {})
    return time.perf_counter() - began


WRITERS = {"plain": plain, "torch.save": torch_save, "written": ours_written, "committed": ours_committed}


def timed_writers(folder, state):
    """Seconds of each of WRITERS, each into an empty folder on a quiet disk."""
    seconds = {}
    for name in random.sample(list(WRITERS), len(WRITERS)):
        with_room = folder / name.replace(".", "-")
        with_room.mkdir()
        os.sync()
        seconds[name] = WRITERS[name](with_room, state)
        shutil.rmtree(with_room)
    return seconds


def beside_training(folder, state, training, writer, step):
    """Seconds that a save blocks, that it takes, and medians of steps before and while it is written."""
    os.sync()
    quiet = training.steps(lambda done: done >= 40)
    plan = Plan(step, {}, None, lambda: None, lambda path: [])
    began = time.perf_counter()
    writer.save(plan, state)
    blocked = time.perf_counter() - began
    busy = training.steps(lambda _: not writer.busy(0))
    took = time.perf_counter() - began
    outcome = writer.outcome()
    assert outcome.error is None, outcome
    after = training.steps(lambda done: done >= 40)
    return {
        "blocked": blocked,
        "took": took,
        "quiet": statistics.median(quiet + after),
        "busy": statistics.median(busy),
        "mean quiet": statistics.mean(quiet + after),
        "mean busy": statistics.mean(busy),
        "steps": len(busy),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path("data/benchmark-checkpoint"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    state = state_of(options.megabytes)
    size = sum(tensor.nbytes for one in state.values() for tensor in one.values())
    training = Training()
    (options.folder / "checkpoints").mkdir()
    writer = CheckpointWriter(options.folder / "checkpoints", Retention(1))
    layouts = {
        file: {name: layout_of(one) for name, one in tensors.items()} for file, tensors in state.items()
    }
    writer.reserve(layouts, then=lambda: None)
    writer.busy(None)
    rounds = []
    for number in range(1, options.rounds + 1):
        rounds.append(timed_writers(options.folder, state))
        rounds[-1] |= beside_training(options.folder, state, training, writer, number)
        print({name: round(value, 4) for name, value in rounds[-1].items()}, flush=True)
    shutil.rmtree(options.folder)
    table(rounds, size)


def table(rounds, size):
    def median(value):
        return statistics.median(value(one) for one in rounds)

    print(f"\nstate of {size / 1e6:.0f} MB, medians of {len(rounds)} rounds")
    for name in ("torch.save", "plain", "written", "committed", "blocked", "took", "quiet", "busy"):
        print(f"  {name:<12} {1e3 * median(lambda one, name=name: one[name]):>9.1f} ms")
    ratios = {
        "blocked": median(lambda one: one["blocked"] / one["torch.save"]),
        "throughput": median(lambda one: one["plain"] / one["written"]),
        "steps": median(lambda one: one["busy"] / one["quiet"]),
    }
    for name, ratio in ratios.items():
        print(f"  {name:<12} {ratio:>9.2f}    goal {GOALS[name]}")


if __name__ == "__main__":
    main()
