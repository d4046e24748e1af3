"""A reader's memory: flat over the epochs, and not growing with the number of samples."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.disk import file_sha256
from data_pipeline.index import DatasetIndex, Shard, Split, index_path, write_dataset
from data_pipeline.shard_index import make_shard_index, write_shard_index

ROOT = Path(__file__).parent.parent.parent

EPOCHS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from functools import partial
from pathlib import Path
import multiprocessing
import torch
from data_pipeline.index import read_dataset
from data_pipeline.plan import Plan, training_work
from data_pipeline.produce import Recipe
from data_pipeline.store import Folder
from data_pipeline.stream import stream

def resident(process):
    fields = dict(line.split(":", 1) for line in open(f"/proc/{process}/status") if line.startswith("Rss"))
    return int(fields["RssAnon"].split()[0])

root, kind, epochs = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
dataset = read_dataset(root)
plan = Plan(dataset.split("train").shard_samples, seed=0, global_batch=32, lanes=4, shuffle_block=256)
recipe = Recipe(Folder(root), dataset, "train", (("random_resized_crop", {"size": 64}),), seed=0)
per_epoch = int(sys.argv[5]) if len(sys.argv) > 5 else plan.steps_per_epoch
steps = range(epochs * per_epoch)
work = partial(training_work, plan, steps=steps, process=0, processes=1, micro_batch=32)
for batch in stream(recipe, work, workers=2, prefetch=2, kind=kind):
    if (batch.work.step + 1) % per_epoch == 0 and batch.last:
        who = ["self"] if kind == "threads" else [child.pid for child in multiprocessing.active_children()]
        print(*(resident(one) for one in who), flush=True)
"""


def resident_after_each_epoch(root, kind, epochs, *limit):
    """KiB of private memory: of the process whose threads read, or of each reader process."""
    words = [sys.executable, "-c", EPOCHS, str(ROOT), str(root), kind, str(epochs), *map(str, limit)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.array([line.split() for line in done.stdout.splitlines()], np.int64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_readers_memory_is_flat_over_five_epochs(photo_dataset, kind):
    epochs = resident_after_each_epoch(photo_dataset, kind, 300).astype(float)
    # 300 passes over 48 samples, looked at in five parts: the last four may differ by 5 %.
    parts = np.array([part.max(axis=0) for part in np.array_split(epochs, 5)])
    assert (parts[1:].max(axis=0) / parts[1:].min(axis=0) < 1.05).all(), parts


def large(root, samples):
    """A data set of `samples` in one shard, all of them the same picture: only the index is large."""
    root.mkdir()
    content = io.BytesIO()
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(content, "PNG")
    import zlib

    data = content.getvalue()
    tar = root / "train-000000.tar"
    tar.write_bytes(bytes(512) + data)
    place = (512, len(data), zlib.crc32(data))
    rows = {f"a/key/as/long/as/they/often/are/{number:012d}": {"png": place} for number in range(samples)}
    index = make_shard_index(rows, np.zeros(samples, np.int32))
    total = write_shard_index(index_path(tar), index)
    shard = Shard(tar.name, samples, tar.stat().st_size, file_sha256(tar), total)
    split = Split((shard,), (samples,), "0" * 16)
    grey = (0.5,) * 3
    write_dataset(root, DatasetIndex("multiclass", ("a",), "RGB", grey, grey, {"train": split}))
    return root


@pytest.mark.slow
def test_a_readers_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    few, many = (
        resident_after_each_epoch(large(tmp_path / str(samples), samples), "processes", 1, 64).max()
        for samples in (2_000, 400_000)
    )
    # The larger index is some 40 MB; a list of its keys alone would take as much again.
    assert (tmp_path / "400000" / "train-000000.idx").stat().st_size > 20e6
    assert many - few < 5_000
