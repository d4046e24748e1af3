"""Measures what a step of our loop costs beside one of a bare PyTorch loop with the same DDP model.

    python benchmarks/step.py [--rounds 30] [--only NUMBER ...]

The bare loop is forward, loss, backward, optimizer.step, zero_grad and nothing else. Ours is the one that
trains: `loop._train_steps` with records, journal, console, sums over the processes, stop flag, stopwatch and
learning rates. Both get the same batches, which lie in memory, and the same network and update rule, each its
own copy. Rounds interleave the contestants within one start, a few hundred milliseconds each: a noisy machine
troubles all alike, and what counts is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

HELD = 8  # steps whose batches are in memory
SEGMENT = 0.5  # seconds that a contestant runs at a time
WARM_UP = 2  # rounds before the first that counts
# Of a step of so many milliseconds; the number of samples makes it so.
NETWORKS = {5: ("mlp", {"hidden": [256, 256], "height": 32, "width": 32}), 50: ("test_resnet", {})}


class Setting(NamedTuple):
    """One start: so many processes, a step of so many milliseconds, and flags of ours."""

    title: str
    processes: int
    milliseconds: int
    flags: tuple[str, ...] = ()
    exact: bool = False  # exact mode runs beside the others


SETTINGS = (
    Setting("1 process, 5 ms", 1, 5),
    Setting("2 processes, 5 ms", 2, 5),
    Setting("1 process, 50 ms", 1, 50),
    Setting("2 processes, 50 ms", 2, 50, exact=True),
    Setting("1 process, 50 ms, ours bf16", 1, 50, ("--train.precision", "bf16")),
)


class Ours(NamedTuple):
    """A job of ours, and what records it."""

    job: Any
    recorder: Any
    flag: Any


def assembled(folder: Path, accelerator, flags: list[str]) -> Ours:
    """A job as the program makes it, in a run directory of its own."""
    from training import assembly, command, reading, run_directory
    from training.recorder import Recorder
    from training.stop_flag import StopFlag

    request = command.read_request(["--run-dir", str(folder), *flags])
    dataset = reading.open_dataset(request.config, learning=True)
    start = run_directory.start_run(request, accelerator, dataset)
    job = assembly.assemble(request, accelerator, dataset, checkpoint=None, progress=start.progress)
    job.watch.follow(accelerator.device)
    return Ours(job, Recorder(job, start), StopFlag(None, since=job.place.began))


def held_batches(job) -> list[list[Any]]:
    """The micro-batches of the first steps, copied out of the readers' buffers."""
    from training.reading import training_batches

    found: list[list[Any]] = [[] for _ in range(HELD)]
    with contextlib.closing(
        training_batches(job.config, job.dataset, job.plan, job.accelerator, steps=range(HELD))
    ) as stream:
        for batch in stream:
            copied = replace(batch, images=batch.images.clone(), targets=batch.targets.clone())
            found[batch.work.step].append(copied)
    return found


def fed(batches, steps: range, times: list[float]):
    """The micro-batches of each step, and in `times` when the first was asked for."""
    for step in steps:
        times.append(time.perf_counter())
        for batch in batches[step % HELD]:
            yield replace(batch, work=batch.work._replace(step=step))


def ours(one: Ours, batches, steps: range) -> float:
    """Seconds a step of our loop."""
    from training import loop

    times: list[float] = []
    loop._train_steps(one.job, one.recorder, one.flag, steps, fed(batches, steps, times))
    return (times[-1] - times[1]) / (len(times) - 2)


class Bare:
    """The loop that everyone would write, with the network and the update rule of `job`."""

    def __init__(self, job) -> None:
        import torch

        from training.optim import build_optimizer

        self.network = copy.deepcopy(job.network)
        self.model = self.network
        if job.accelerator.num_processes > 1:
            self.model = torch.nn.parallel.DistributedDataParallel(
                self.network, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.optimizer = build_optimizer(
            self.network, job.config.optim, head=job.head, trainable=job.freezing.trainable, device_type="cpu"
        )
        mean, std = job.pixel_statistics
        self.mean = (torch.tensor(mean) * 255).view(1, -1, 1, 1)
        self.std = (torch.tensor(std) * 255).view(1, -1, 1, 1)
        self.loss = torch.nn.functional.cross_entropy
        self.network.train()

    def __call__(self, batches, steps: range) -> float:
        """Seconds a step."""
        times: list[float] = []
        for batch in fed(batches, steps, times):
            images = batch.images.permute(0, 3, 1, 2).float().contiguous()
            outputs = self.model(images.sub_(self.mean).div_(self.std))
            self.loss(outputs, batch.targets).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return (times[-1] - times[1]) / (len(times) - 2)


def measure(setting: Setting, options: argparse.Namespace) -> None:
    """One setting, in each of its processes; process zero prints the seconds a step of every round."""
    import torch

    from training import assembly, command

    torch.set_num_threads(1)
    name, arguments = NETWORKS[setting.milliseconds]
    flags = ["--data.root", options.data, "--data.workers", "0", "--train.global-batch", str(options.batch)]
    flags += ["--model.name", name, "--model.arguments", json.dumps(arguments), *setting.flags]
    flags += ["--train.epochs", "1000000", "--eval.every-epochs", "1000000", "--optim.warmup", "0"]
    # So slow that nothing is learned: gradients that vanish make for numbers that a processor is slow with.
    flags += ["--optim.lr", "1e-6"]
    accelerator = assembly.join(command.read_request(flags).config)
    fast = assembled(options.folder / "fast", accelerator, flags)
    batches = held_batches(fast.job)
    contestants = {"bare": partial(Bare(fast.job), batches), "lockstep": partial(ours, fast, batches)}
    if setting.exact:
        exact = assembled(options.folder / "exact", accelerator, [*flags, "--train.exact", "true"])
        contestants["exact"] = partial(ours, exact, held_batches(exact.job))
    rounds = []
    count = max(6, round(SEGMENT * 1000 / setting.milliseconds))
    for number in range(WARM_UP + options.rounds):
        steps = range(number * count, (number + 1) * count)
        # Turn by turn from either end: whoever runs second finds warmer caches.
        order = list(contestants)[:: 1 if number % 2 else -1]
        rounds.append({one: contestants[one](steps) for one in order})
    if accelerator.is_main_process:
        print("\n" + json.dumps(rounds[WARM_UP:]), flush=True)
    accelerator.wait_for_everyone()
    os._exit(0)


def batch_of(setting: Setting) -> int:
    """Samples of a global batch whose step takes about the setting's milliseconds on one thread here."""
    import torch

    from training.networks.build import build_network

    torch.set_num_threads(1)
    name, arguments = NETWORKS[setting.milliseconds]
    network = build_network(name, arguments=arguments, task="multiclass", channels=1, outputs=10)
    optimizer = torch.optim.AdamW(network.parameters())

    def seconds(samples: int) -> float:
        images, targets, taken = torch.randn(samples, 1, 32, 32), torch.zeros(samples, dtype=torch.long), []
        for _ in range(20):
            began = time.perf_counter()
            torch.nn.functional.cross_entropy(network(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    few, many = 64, 448
    low, high = seconds(few), seconds(many)
    share = few + (setting.milliseconds / 1000 - low) / (high - low) * (many - few)
    return setting.processes * min(88, max(2, round(share / 8))) * 8  # 1,438 digits are what there is


def run(setting: Setting, options: argparse.Namespace) -> None:
    """Start the processes of a setting, and print its table."""
    words = ["--one", str(SETTINGS.index(setting)), "--batch", str(batch_of(setting))]
    words += ["--rounds", str(options.rounds), "--data", str(options.data)]
    launcher = [sys.executable]
    if setting.processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={setting.processes}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, __file__, *words, "--folder", folder]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{setting.title}:\n{done.stdout}{done.stderr}")
    table(setting, json.loads(done.stdout.splitlines()[-1]))


def table(setting: Setting, rounds: list[dict[str, float]]) -> None:
    """Medians over the rounds, and of the ratios within a round, with their quartiles."""
    print(f"\n{setting.title:<34} ms a step   ratio to bare (quartiles)")
    for name in rounds[0]:
        ms = 1000 * statistics.median(one[name] for one in rounds)
        print(f"  {name:<32} {ms:>9.2f}   {ratios(rounds, name, 'bare')}")
    if "exact" in rounds[0]:
        print(f"  {'exact to lockstep':<32} {'':>9}   {ratios(rounds, 'exact', 'lockstep')}", flush=True)


def ratios(rounds: list[dict[str, float]], one: str, other: str) -> str:
    """Of two contestants, over the rounds."""
    low, middle, high = statistics.quantiles((each[one] / each[other] for each in rounds), n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--data", default="data/digits", help="folder of the embedded digits")
    parser.add_argument("--only", type=int, nargs="+", default=list(range(len(SETTINGS))), metavar="NUMBER")
    for hidden, kind in {"--one": int, "--batch": int, "--folder": Path}.items():
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()

    from data_pipeline import torchvision_cpu
    from data_pipeline.digits import ensure_digits

    torchvision_cpu.declare_missing_operators()
    if options.one is not None:
        measure(SETTINGS[options.one], options)
    ensure_digits(Path(options.data))
    for number in options.only:
        run(SETTINGS[number], options)


if __name__ == "__main__":
    main()
