"""What dataset.json says of a data set: its task, classes, pixels' statistics, and the tars of each split.

Shapes: S shards, C classes (multilabel: labels; segmentation: classes of pixels).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.disk import replace_file
from data_pipeline.draws import IntArray
from data_pipeline.fault import UserError

FORMAT = 2
DATASET_FILE = "dataset.json"
SHARD_NAME = re.compile(r"[^/\0]+\.tar", re.DOTALL)
SHA256 = re.compile("[0-9a-f]{64}")
TASKS = ("multiclass", "multilabel", "segmentation")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Shard:
    """One tar of a split: file name, samples, size in bytes, SHA-256 of the tar and of its index in hex."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        """The file name of its index."""
        return index_name(self.name)


@dataclass(frozen=True)
class Split:
    """The shards of one split in order, what there is of each class, the digest of all keys (16 hex digits).

    `class_counts` [C] counts samples (multiclass), samples with a 1 (multilabel) or pixels (segmentation).
    """

    shards: tuple[Shard, ...]
    class_counts: tuple[int, ...]
    keys_digest: str

    @cached_property
    def shard_samples(self) -> IntArray:
        """int64 [S], samples of each shard."""
        return np.array([shard.samples for shard in self.shards], np.int64)

    @property
    def samples(self) -> int:
        """Samples of the split."""
        return int(self.shard_samples.sum())


@dataclass(frozen=True)
class Members:
    """The members of a sample that are read, by extension: the image (the first that is there), the target.

    Labels are in the index of each shard, so a target member is only read where it is a mask.
    """

    image: tuple[str, ...] = IMAGE_EXTENSIONS
    target: str = "cls"


@dataclass(frozen=True)
class DatasetIndex:
    """What dataset.json holds. `mean` and `std` are per channel of the training pixels scaled to 0..1.

    `mask_values` [C] are the pixel values of the classes in a segmentation's masks, such as (0, 255); `tars`
    is the folder or URL of the tars where they do not lie beside dataset.json.
    """

    task: str
    classes: tuple[str, ...]
    image_mode: str  # "L" (one channel) or "RGB"
    mean: tuple[float, ...]
    std: tuple[float, ...]
    splits: dict[str, Split]
    members: Members = Members()
    mask_values: tuple[int, ...] = ()
    tars: str = ""

    @property
    def channels(self) -> int:
        """Channels of a decoded image."""
        return 1 if self.image_mode == "L" else 3

    def identity(self) -> str:
        """SHA-256 in hex of everything that decides which samples a run sees, wherever they lie."""
        content = {name: value for name, value in _as_json(self).items() if name != "tars"}
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def split(self, name: str) -> Split:
        """The named split; DATA where there is none."""
        if name not in self.splits:
            raise UserError(f"the data set has no split {name!r}", mend=f"it has: {', '.join(self.splits)}")
        return self.splits[name]


def write_dataset(root: Path, dataset: DatasetIndex) -> None:
    """Write dataset.json, atomically: its presence says that the data set is complete."""
    text = json.dumps(_as_json(dataset), indent=1, ensure_ascii=False) + "\n"
    replace_file(root / DATASET_FILE, lambda part: part.write_text(text, encoding="utf-8"))


def read_dataset(root: Path) -> DatasetIndex:
    """Read dataset.json; DATA where there is none or it is damaged, UNSAFE where a shard leaves `root`."""
    path = root / DATASET_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        where = "it holds no dataset.json" if root.is_dir() else "there is no such folder"
        raise UserError(
            f"no data set at '{root}': {where}",
            mend=f"make one from your pictures: lockstep pack PICTURES {root}",
        ) from None
    except OSError as error:
        raise UserError(f"cannot use '{path}': {error}", mend="make it readable") from None
    return parse_dataset(content, str(path))


def parse_dataset(content: bytes, origin: str) -> DatasetIndex:
    """What a dataset.json says; DATA where it is damaged, UNSAFE where a shard leaves its folder."""
    try:
        dataset = _from_json(json.loads(content.decode()))
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot use '{origin}': {error}", mend="make the data set again") from None
    names = [shard.name for split in dataset.splits.values() for shard in split.shards]
    if strangers := [name for name in names if not SHARD_NAME.fullmatch(name)]:
        raise UserError(
            f"'{origin}' names a shard that is no tar in its folder: {strangers[0]!r}",
            mend="pack the data set again, or do not use it",
            code="UNSAFE",
        )
    return dataset


def _as_json(dataset: DatasetIndex) -> dict[str, Any]:
    counts = {name: split.samples for name, split in dataset.splits.items()}
    return {"format": FORMAT, **asdict(dataset), "counts": counts}


def _from_json(raw: dict[str, Any]) -> DatasetIndex:
    if raw["format"] != FORMAT:
        raise ValueError(f"it has format {raw['format']}, this version reads format {FORMAT}")
    members = raw["members"]
    dataset = DatasetIndex(
        task=raw["task"],
        classes=tuple(map(str, raw["classes"])),
        image_mode=raw["image_mode"],
        mean=tuple(map(float, raw["mean"])),
        std=tuple(map(float, raw["std"])),
        splits={name: _split_from_json(split) for name, split in raw["splits"].items()},
        members=Members(tuple(map(str, members["image"])), str(members["target"])),
        mask_values=tuple(map(int, raw["mask_values"])),
        tars=str(raw["tars"]),
    )
    _check(dataset)
    return dataset


def _check(dataset: DatasetIndex) -> None:
    classes, means = len(dataset.classes), len(dataset.mean)
    if dataset.task not in TASKS:
        raise ValueError(f"it is of the task {dataset.task!r}, this version knows {', '.join(TASKS)}")
    if dataset.image_mode not in ("L", "RGB") or not means == len(dataset.std) == dataset.channels:
        raise ValueError(
            f"image mode {dataset.image_mode!r} with {means} means and {len(dataset.std)} deviations"
        )
    if any(len(split.class_counts) != classes for split in dataset.splits.values()):
        raise ValueError(f"{classes} classes, but not as many counts in each split")
    values = dataset.mask_values
    if len(values) != (classes if dataset.task == "segmentation" else 0) or len(set(values)) != len(values):
        raise ValueError(f"{classes} classes, but the mask values {list(values)}")
    if any(not 0 <= value <= 255 for value in values):
        raise ValueError(f"the mask values {list(values)} are not all from 0 to 255")


def _split_from_json(raw: dict[str, Any]) -> Split:
    return Split(
        tuple(_shard_from_json(one) for one in raw["shards"]),
        tuple(map(int, raw["class_counts"])),
        str(raw["keys_digest"]),
    )


def _shard_from_json(raw: dict[str, Any]) -> Shard:
    sums = [str(raw["sha256"]), str(raw["index_sha256"])]
    if not all(map(SHA256.fullmatch, sums)) or min(raw["samples"], raw["bytes"]) < 0:
        raise ValueError(f"the entry of shard {raw['name']!r} is damaged")
    return Shard(str(raw["name"]), int(raw["samples"]), int(raw["bytes"]), *sums)


def index_name(shard: str) -> str:
    """The file name of a tar's index: the same name with .idx."""
    return shard.removesuffix(".tar") + ".idx"


def index_path(shard: Path) -> Path:
    """The index that lies beside a tar."""
    return shard.with_name(index_name(shard.name))
