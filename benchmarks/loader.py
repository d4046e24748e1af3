"""Measures loaders side by side: CPU microseconds an image and images a second, all of them in every round.

    python benchmarks/loader.py [--images 2048] [--rounds 3] [--workers 1 2] [--folder DIR]

All deliver batches of 64 images of 224 x 224 after a random resized crop and a flip, uint8 (ours) or float32
(the usual way). Each measurement is a process of its own; CPU is what it and its children burn between the
first delivered batches and the last. Rounds interleave the contestants: a noisy machine troubles all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BATCH, SIZE, WARM_UP = 64, 224, 4  # WARM_UP batches are delivered before the clock starts
NORMAL = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OURS = (("random_resized_crop", {"size": SIZE}), ("horizontal_flip", {}))
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """User and system time of this process and its living children."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = 0.0
    for process in ["self", *children]:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def usual_transform():
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(*NORMAL),
        ]
    )


def our_transform(encoded):
    """Decode, crop and flip as our pipeline does, with a generator that each process draws from."""
    import numpy as np

    from data_pipeline.transforms import TRANSFORMS

    global _draws, _open
    if "_open" not in globals():
        _draws, _open = np.random.default_rng(os.getpid()), opener()
    pixels = _open(raw(encoded), _draws)
    return TRANSFORMS["horizontal_flip"](pixels, _draws).image


def opener():
    from data_pipeline.framing import Opener
    from data_pipeline.index import DatasetIndex

    return Opener(DatasetIndex("multiclass", ("a",), "RGB", *NORMAL, {}), OURS[0])


def raw(encoded):
    from data_pipeline.batch import RawSample

    return RawSample(0, "", encoded, None, 0, "", 0)


def webdataset_usual(base, workers, images):
    """WebDataset + Pillow + torchvision under a DataLoader: what everyone writes."""
    return webdataset_loader(base, workers, images, "pil", usual_transform())


def webdataset_our_transform(base, workers, images):
    """WebDataset under a DataLoader, with our decoder and transforms."""
    return webdataset_loader(base, workers, images, None, our_transform)


def webdataset_loader(base, workers, images, decoder, transform):
    import webdataset
    from torch.utils.data import DataLoader

    urls = sorted(map(str, (base / "packed").glob("*.tar")))
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), nodesplitter=None, resampled=True).shuffle(500)
    data = data.decode(decoder) if decoder else data
    data = data.to_tuple("jpg", "cls").map_tuple(transform, int)
    return DataLoader(data.repeat(), batch_size=BATCH, num_workers=workers, prefetch_factor=4)


def image_folder(base, workers, images):
    """ImageFolder + torchvision under a DataLoader."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder

    data = ImageFolder(base / "folder", usual_transform())
    sampler = RandomSampler(data, replacement=True, num_samples=10**9)
    return DataLoader(data, BATCH, sampler=sampler, num_workers=workers, prefetch_factor=4)


def ours(base, workers, images, *, kind):
    """Our stream."""
    from data_pipeline.index import read_dataset
    from data_pipeline.plan import Plan, training_work
    from data_pipeline.produce import Recipe
    from data_pipeline.store import Folder
    from data_pipeline.stream import stream

    dataset = read_dataset(base / "packed")
    recipe = Recipe(Folder(base / "packed"), dataset, "train", OURS, seed=0)
    sizes = dataset.split("train").shard_samples
    plan = Plan(sizes, seed=0, global_batch=BATCH, lanes=4, shuffle_block=4096)
    work = partial(training_work, plan, steps=range(10**6), process=0, processes=1, micro_batch=BATCH)
    return stream(recipe, work, workers=workers, prefetch=4, kind=kind)


def decode_alone(base, workers, images):
    """Decode, crop-resize and flip of bytes in memory, in threads: no reading, no batches, no transport."""
    import numpy as np

    from data_pipeline.transforms import TRANSFORMS

    files = sorted((base / "folder").rglob("*.jpg"))
    encoded = [path.read_bytes() for path in files]

    def work(number):
        draws, opened = np.random.default_rng(number), opener()
        for row in range(BATCH):
            pixels = opened(raw(encoded[(number * BATCH + row) % len(encoded)]), draws)
            TRANSFORMS["horizontal_flip"](pixels, draws)

    with ThreadPoolExecutor(workers) as pool:
        pending = [pool.submit(work, number) for number in range(3 * workers)]
        while True:
            pending.append(pool.submit(work, len(pending)))
            yield pending.pop(0).result()


CONTESTANTS = {
    "webdataset + Pillow + torchvision": webdataset_usual,
    "ImageFolder + torchvision": image_folder,
    "webdataset + our transform": webdataset_our_transform,
    "decode + crop-resize alone": decode_alone,
    "lockstep, threads": partial(ours, kind="threads"),
    "lockstep, processes": partial(ours, kind="processes"),
}


def measure(name: str, base: Path, workers: int, images: int, step_us: float) -> dict[str, float]:
    """One contestant. With `step_us` the main thread launches tiny torch steps that long for every image."""
    import torch

    torch.set_num_threads(1)
    batches = iter(CONTESTANTS[name](base, workers, images))
    for _ in range(WARM_UP):
        next(batches)
    started, burnt, busy = time.perf_counter(), cpu_seconds(), 0.0
    for _ in range(images // BATCH):
        next(batches)
        if step_us:
            busy += launch_steps(BATCH * step_us / 1e6)
    wall, cpu = time.perf_counter() - started, cpu_seconds() - burnt - busy
    return {"us": cpu / images * 1e6, "rate": images / wall}


def launch_steps(seconds: float) -> float:
    """Launch small torch operations, as a training loop does, for so long."""
    import torch

    weight, until = torch.zeros(64), time.perf_counter() + seconds
    while time.perf_counter() < until:
        for _ in range(20):
            weight.add_(1.0)
    return seconds


def run(name: str, base: Path, workers: int, images: int, step_us: float = 0.0) -> dict[str, float]:
    """`measure` in a process of its own."""
    words = ["--one", name, "--base", str(base), "--workers", str(workers), "--images", str(images)]
    command = [sys.executable, __file__, *words, "--step-us", str(step_us)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{name}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, default=Path("data/benchmark"))
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), metavar="NAME")
    for hidden in ("--one", "--base", "--step-us"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        found = measure(
            options.one, Path(options.base), options.workers[0], options.images, float(options.step_us)
        )
        print(json.dumps(found))
        return
    import photos

    for size in photos.SIZES:
        base = photos.make(options.folder, size, 1024)
        for workers in options.workers:
            rows = [
                {name: run(name, base, workers, options.images) for name in options.only}
                for _ in range(options.rounds)
            ]
            table(f"{size}, {workers} worker{'s' * (workers > 1)}", rows)
        busy(size, base, options)


def table(title: str, rows: list[dict[str, dict[str, float]]]) -> None:
    """Medians over the rounds."""
    print(f"\n{title:<40} CPU us an image   images/s")
    for name in rows[0]:
        us = statistics.median(row[name]["us"] for row in rows)
        rate = statistics.median(row[name]["rate"] for row in rows)
        print(f"  {name:<38} {us:>15.0f} {rate:>10.0f}", flush=True)


def busy(size: str, base: Path, options: argparse.Namespace) -> None:
    """One worker while the main thread launches steps for 95 % of the time that the idle loader needs."""
    print(f"\n{size}, 1 worker, main thread 95 % busy {'idle':>10} {'busy':>10}   images/s")
    for name in [one for one in options.only if one.startswith("lockstep")]:
        shares = []
        for _ in range(options.rounds):
            idle = run(name, base, 1, options.images)["rate"]
            shares.append((idle, run(name, base, 1, options.images, 0.95e6 / idle)["rate"]))
        idle, under = (statistics.median(values) for values in zip(*shares, strict=True))
        ratio = statistics.median(one / two for two, one in shares)
        print(f"  {name:<38} {idle:>10.0f} {under:>10.0f}   {ratio:.0%} of idle", flush=True)


if __name__ == "__main__":
    main()
