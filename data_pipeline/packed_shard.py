"""Writes one tar of pictures and targets, and its index, and sums up what is in it."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.disk import fsync_file
from data_pipeline.draws import hash64
from data_pipeline.index import index_path
from data_pipeline.items import Item, Target
from data_pipeline.pictures import Stored, stored_mask, stored_picture
from data_pipeline.shard_index import MISSING, make_shard_index, write_shard_index
from data_pipeline.shard_result import ShardResult, Tally
from data_pipeline.tar_writer import tar_writer
from data_pipeline.tars import index_one, member_parts

TARGETS = {"multiclass": "cls", "multilabel": "json", "segmentation": "mask.png"}
# The disk or the machine fails, not one file: everything behind it would be left out for no fault of its own.
NOT_THE_FILE = frozenset(
    {errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENODEV}
    | {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)


@dataclass(frozen=True)
class Storage:
    """How pictures are stored: the shorter side in pixels, progressive JPEG made baseline, JPEG's quality."""

    resize_shorter: int | None
    reencode: bool
    quality: int


@dataclass(frozen=True)
class ShardJob:
    """What one worker writes: a tar at `path` with these items, in this order."""

    path: Path
    split: str
    items: tuple[Item, ...]
    task: str
    classes: tuple[str, ...]
    storage: Storage


def write_shard(job: ShardJob, tick: Callable[[], object]) -> ShardResult:
    """Write the tar and its index beside it; `tick` is called after every picture.

    What cannot be read is left out, with its reason. OSError where it is the disk or the machine that fails.
    """
    part = job.path.with_name(f".{job.path.name}.part")
    content = _Content(job)
    with part.open("wb") as file, tar_writer(file) as tar:
        for item in job.items:
            if members := content.take(item):
                tar.write({"__key__": item.key, **members})
            tick()
    written = index_one(part)
    assert len(written.rows) == len(content.targets), f"{part} holds other samples than were written"
    index_size, index_digest = 0, ""
    if content.targets:
        index = make_shard_index(written.rows, content.labels())
        fsync_file(part)
        part.replace(job.path)
        index_digest = write_shard_index(index_path(job.path), index)
        index_size = index_path(job.path).stat().st_size
    else:
        part.unlink()
    return ShardResult(
        job.path.name,
        job.split,
        len(content.targets),
        written.size,
        written.sha256,
        index_size,
        index_digest,
        content.tally(),
        content.bad,
    )


class _Content:
    """The samples of a tar, as far as they could be read: their targets in order, and their sums."""

    def __init__(self, job: ShardJob) -> None:
        self._job = job
        self.targets: list[Target] = []
        self.bad: list[list[str]] = []
        self._histogram = np.zeros((3, 256), np.int64)
        self._mask_values = np.zeros(256, np.int64)
        self._coloured = False
        self._progressive = 0
        self._keys_digest = 0

    def take(self, item: Item) -> dict[str, bytes]:
        """The members of a sample by extension; none where it cannot be read."""
        how, reading = self._job.storage, item.file
        try:
            if member_parts(f"{item.key}.jpg") != (item.key, "jpg"):
                raise ValueError(f"readers of tars take no sample {item.key!r}: give it another name")
            picture = stored_picture(
                item.path, resize_shorter=how.resize_shorter, reencode=how.reencode, quality=how.quality
            )
            if isinstance(item.target, Path):
                reading = str(item.target)
                mask = stored_mask(
                    item.target, size=picture.size, resize_shorter=how.resize_shorter, turn=picture.turn
                )
                target = mask.data
                self._mask_values += mask.values
            else:
                target = target_member(item.target, self._job.classes)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in NOT_THE_FILE:
                raise
            self.bad.append([reading, str(error)])
            return {}
        self._count(picture, item)
        return {picture.extension: picture.data, TARGETS[self._job.task]: target}

    def labels(self) -> NDArray[Any]:
        """The column of labels of the index, one row a sample."""
        if self._job.task == "multiclass":
            return np.array(self.targets, np.int32)
        if self._job.task == "multilabel":
            return np.array(self.targets, np.int8).reshape(len(self.targets), len(self._job.classes))
        return np.zeros((len(self.targets), 0), np.int8)

    def tally(self) -> Tally:
        """The sums over all samples that were taken."""
        labels, classes = self.labels(), len(self._job.classes)
        by_class = np.bincount(labels, minlength=classes) if labels.ndim == 1 else (labels == 1).sum(axis=0)
        return Tally(
            class_counts=by_class.tolist(),
            missing=int((labels == MISSING).sum()),
            mask_values=self._mask_values.tolist(),
            histogram=self._histogram.tolist(),
            coloured=self._coloured,
            progressive=self._progressive,
            keys_digest=self._keys_digest % 2**64,
        )

    def _count(self, picture: Stored, item: Item) -> None:
        self.targets.append(item.target)
        counts = np.array(picture.shown.histogram(), np.int64).reshape(-1, 256)
        self._histogram += counts  # a grey picture counts alike in all three channels
        self._coloured |= len(counts) == 3
        self._progressive += picture.progressive
        self._keys_digest += hash64(item.key.encode())


def target_member(target: int | tuple[int, ...], classes: tuple[str, ...]) -> bytes:
    """What a class number or labels (1, 0, -1 for a missing one, null in JSON) are in the tar."""
    if isinstance(target, int):
        return str(target).encode()
    given = {name: None if one == MISSING else one for name, one in zip(classes, target, strict=True)}
    return json.dumps({"labels": given}, ensure_ascii=False).encode()
