"""Makes photo-like JPEG data sets for the loader benchmark: crops of photographs, packed and in folders."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_pipeline.disk import file_sha256
from data_pipeline.index import DatasetIndex, Shard, Split, index_path, write_dataset
from data_pipeline.shard_index import make_shard_index, write_shard_index
from data_pipeline.tars import tar_members

CLASSES = 10
SHARDS = 4
SIZES = {"500x375": (500, 375, 97), "256px": (341, 256, 95)}  # width, height, JPEG quality


def encoded(name: str, count: int):
    """Yield `count` JPEGs; about 85 KB at 500x375 and 36 KB with a short side of 256."""
    width, height, quality = SIZES[name]
    sources = [
        Image.fromarray(np.ascontiguousarray(one))
        for one in [
            *load_sample_images().images,
            data.astronaut(),
            data.coffee(),
            data.chelsea(),
            data.rocket(),
        ]
    ]
    draws = np.random.Generator(np.random.Philox(key=[1, 2]))
    for number in range(count):
        source = sources[number % len(sources)]
        share = 0.6 + 0.4 * draws.random()
        crop_width = min(source.width, source.height * 4 / 3) * share
        crop_height = crop_width * 3 / 4
        left = draws.random() * (source.width - crop_width)
        top = draws.random() * (source.height - crop_height)
        box = (left, top, left + crop_width, top + crop_height)
        picture = source.resize((width, height), Image.Resampling.LANCZOS, box=box)
        if draws.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=quality)
        yield number, content.getvalue()


def make(root: Path, name: str, count: int) -> Path:
    """ROOT/NAME/packed (tars and index) and ROOT/NAME/folder (a folder per class), once."""
    base = root / f"{name}-{count}"
    if (base / "packed" / "dataset.json").exists():
        return base
    (base / "packed").mkdir(parents=True, exist_ok=True)
    for label in range(CLASSES):
        (base / "folder" / str(label)).mkdir(parents=True, exist_ok=True)
    per_shard, shards = -(-count // SHARDS), []
    pictures = list(encoded(name, count))
    for number in range(SHARDS):
        path = base / "packed" / f"train-{number:06d}.tar"
        part = pictures[number * per_shard : (number + 1) * per_shard]
        with path.open("wb") as file, webdataset.TarWriter(file, mtime=0) as tar:
            for one, content in part:
                label = one % CLASSES
                tar.write({"__key__": f"{one:06d}", "jpg": content, "cls": str(label)})
                (base / "folder" / str(label) / f"{one:06d}.jpg").write_bytes(content)
        labels = np.array([one % CLASSES for one, _ in part], np.int32)
        index_sum = write_shard_index(index_path(path), make_shard_index(tar_members(path), labels))
        shards.append(Shard(path.name, len(part), path.stat().st_size, file_sha256(path), index_sum))
    counts = tuple(np.bincount(np.arange(count) % CLASSES, minlength=CLASSES).tolist())
    split = Split(tuple(shards), counts, "0" * 16)
    grey = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    names = tuple(map(str, range(CLASSES)))
    write_dataset(base / "packed", DatasetIndex("multiclass", names, "RGB", *grey, {"train": split}))
    return base
