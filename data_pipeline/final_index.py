"""Turns the draft of a foreign tar into its index, when all classes are known, and looks at some images.

Shapes: R samples of the tar, N names found in it, C classes of the data set.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from data_pipeline.decode import FORMATS, decode
from data_pipeline.draws import IntArray
from data_pipeline.fault import first_line
from data_pipeline.foreign_shard import MAX_PICTURE
from data_pipeline.index import Shard, index_name
from data_pipeline.shard_draft import Draft, DraftFiles
from data_pipeline.shard_index import MISSING, ShardIndex, read_shard_index, write_shard_index

GREY_MODES = ("1", "L", "LA", "F")
BROKEN = 3  # images that cannot be decoded and are named


@dataclass(frozen=True)
class FinalJob:
    """One draft to finish: the number of each class or label, and the rows whose images are looked at."""

    tar: Path
    drafts: DraftFiles
    destination: Path
    task: str
    numbers: dict[str, int]
    images: tuple[str, ...]  # extensions, the first that a sample has is its image
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Looked:
    """Pixels of each value in each channel [3][256] of the images that were decoded; grey counts in all."""

    index_sha256: str
    histogram: list[list[int]]
    coloured: bool
    decoded: int
    broken: list[str]


def finish_shard(job: FinalJob, tick: Callable[[], object]) -> None:
    """Write the index of a tar and keep what its images are like."""
    draft = job.drafts.read(job.tar.name)
    assert isinstance(draft, Draft)
    shard = Shard(job.tar.name, draft.samples, draft.bytes, draft.sha256, draft.index_sha256)
    index = read_shard_index(job.drafts.index(job.tar.name), shard)
    index = replace(index, labels=_numbered(index.labels, draft.names, job))
    digest = write_shard_index(job.destination / index_name(job.tar.name), index)
    looked = _look(job, index, digest)
    _looked_path(job.drafts, job.tar.name).write_text(json.dumps(asdict(looked)), encoding="utf-8")
    tick()


def read_looked(drafts: DraftFiles, shard: str) -> Looked:
    """What `finish_shard` kept."""
    raw: dict[str, Any] = json.loads(_looked_path(drafts, shard).read_text(encoding="utf-8"))
    return Looked(**raw)


def _looked_path(drafts: DraftFiles, shard: str) -> Path:
    return drafts.folder / f"{shard}.looked.json"


def _numbered(labels: NDArray[Any], names: tuple[str, ...], job: FinalJob) -> NDArray[Any]:
    """Labels by the numbers of the data set's classes; a label that the tar never names is missing."""
    if job.task == "segmentation":
        return labels
    numbers = np.array([job.numbers[name] for name in names], np.int32)
    if job.task == "multiclass":
        numbered: NDArray[np.int32] = numbers[labels]
        return numbered
    table = np.full((len(labels), len(job.numbers)), MISSING, np.int8)
    table[:, numbers] = labels
    return table


def _look(job: FinalJob, index: ShardIndex, digest: str) -> Looked:
    histogram: IntArray = np.zeros((3, 256), np.int64)
    coloured, decoded = False, 0
    broken: list[str] = []
    with job.tar.open("rb") as file:
        for row in job.rows:
            column = index.column(job.images, row)
            assert column is not None
            offset, size = int(index.offset[row, column]), int(index.size[row, column])
            try:
                data = os.pread(file.fileno(), size, offset) if size <= MAX_PICTURE else b""
                image = decode(data, mode="RGB")
                coloured = coloured or is_coloured(data)
            except Exception as error:  # Pillow has no list of what it raises on a broken file
                broken.append(f"{job.tar.name}: {index.key(row)!r}: {first_line(error)}")
                continue
            decoded += 1
            for channel in range(3):
                histogram[channel] += np.bincount(image[:, :, channel].ravel(), minlength=256)
    return Looked(digest, histogram.tolist(), coloured, decoded, broken)


def is_coloured(data: bytes) -> bool:
    """Whether a picture's header says that it has colours."""
    with PillowImage.open(io.BytesIO(data), formats=FORMATS) as picture:
        return picture.mode not in GREY_MODES and not picture.mode.startswith("I")
