"""Examines one shard of a data set: its bytes, its index against the tar itself, then the samples.

Shapes: R rows (samples) of the shard, C classes or labels.
"""

from __future__ import annotations

import warnings
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.disk import file_sha256
from data_pipeline.doctor_labels import LabelCounts, check_labels, no_labels
from data_pipeline.doctor_places import BadRows, check_places
from data_pipeline.doctor_samples import Seen, examine_samples
from data_pipeline.draws import IntArray, hash64
from data_pipeline.fault import UserError
from data_pipeline.findings import Finding, Findings
from data_pipeline.index import DatasetIndex, Shard
from data_pipeline.read import ShardReader
from data_pipeline.shard_index import Place, ShardIndex, read_shard_index
from data_pipeline.store import Folder, Opened, load_dataset
from data_pipeline.tars import index_one, member_parts
from data_pipeline.urls import local_path


class ShardJob(NamedTuple):
    """One shard to examine: `rows` are the samples to decode, None for all of them."""

    root: str
    split: str
    position: int
    rows: IntArray | None = None


@dataclass(frozen=True, eq=False)
class Sums:
    """What can be added over shards: labels, what decoding told, samples to decode, samples to be skipped."""

    labels: LabelCounts
    seen: Seen = field(default_factory=Seen)
    tried: int = 0
    bad: int = 0
    whole: bool = True  # whether every index could be used, so that sums over it mean something

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.labels + other.labels,
            self.seen + other.seen,
            self.tried + other.tried,
            self.bad + other.bad,
            self.whole and other.whole,
        )


class Prints(NamedTuple):
    """What tells samples of different shards apart, 16 bytes each; empty where an index cannot be used.

    `keys` [R] are hash64 of each key, `pictures` [R] CRC-32 and size of each image, 0 where it is not whole.
    """

    keys: NDArray[np.uint64] = np.empty(0, np.uint64)
    pictures: NDArray[np.uint64] = np.empty(0, np.uint64)


class ShardReport(NamedTuple):
    """What was found in one shard."""

    findings: tuple[Finding, ...]
    sums: Sums
    prints: Prints = Prints()


class _Tar(NamedTuple):
    """A tar that can be read, and its members where it is a whole one."""

    path: Path | None = None
    members: dict[str, dict[str, Place]] | None = None


@lru_cache(maxsize=1)
def open_dataset(root: str) -> Opened:
    """The data set at `root`, read once a process."""
    return load_dataset(root)


def tars_folder(opened: Opened) -> Path | None:
    """The folder of the tars where that is on this machine."""
    root, tars = opened.store.root if isinstance(opened.store, Folder) else None, opened.dataset.tars
    return root / local_path(tars) if root is not None and tars else root


def examine_shard(job: ShardJob) -> ShardReport:
    """Read one shard from front to back and say what is wrong with it; the unit of work of a process.

    Its pages are still in memory when its samples are decoded, so the disk reads it once.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd EXIF and palettes; what matters is a finding
        return _examine(job)


def _examine(job: ShardJob) -> ShardReport:
    opened = open_dataset(job.root)
    dataset, split = opened.dataset, opened.dataset.split(job.split)
    shard = split.shards[job.position]
    found = Findings()
    index = _index(opened, shard, found)
    tar = _tar(opened, shard, index, found)
    keys = None if index is None else _key_hashes(index, shard, found)
    if index is None or keys is None:
        return ShardReport(found.all(), Sums(no_labels(dataset), whole=False))
    bad = BadRows() if tar.members is None else check_places(dataset, index, tar.members, shard, found)
    labels = check_labels(dataset, index, shard, tar.path, found, known=bad.targets)
    if labels is None or tar.path is None:
        sums = Sums(labels or no_labels(dataset), bad=len(bad.samples), whole=labels is not None)
        return ShardReport(found.all(), sums, Prints(keys))
    rows = np.arange(len(index)) if job.rows is None else job.rows
    good = np.array([row for row in rows.tolist() if row not in bad.samples], np.int64)
    first = int(split.shard_samples[: job.position].sum())
    seen = Seen()
    with closing(ShardReader(opened.store, dataset, job.split)) as reader:
        for row, one in zip(
            good.tolist(), examine_samples(reader, dataset, first + good, found), strict=True
        ):
            if one is None:
                bad.samples.add(row)
            else:
                seen += one
    prints = Prints(keys, picture_prints(dataset, index, bad.samples))
    return ShardReport(found.all(), Sums(labels, seen, len(good), len(bad.samples)), prints)


def _index(opened: Opened, shard: Shard, found: Findings) -> ShardIndex | None:
    try:
        return read_shard_index(opened.store.index_path(shard), shard)
    except UserError as error:
        found.add(Finding("index-damaged", error.what, shard.name, mending=error.mend))
        return None


def _tar(opened: Opened, shard: Shard, index: ShardIndex | None, found: Findings) -> _Tar:
    """Read the tar once, for its checksum and its members."""
    try:
        path = opened.store.shard_path(shard)
        try:
            walked = index_one(path)
            members, checksum = walked.rows, walked.sha256
        except UserError as error:
            found.add(_damaged(error, shard))
            members, checksum = None, file_sha256(path)
    except UserError as error:
        missing = Finding("shard-missing", error.what, shard.name, mending=error.mend)
        found.add(_cut_off(opened, shard, index) or missing)
        return _Tar()
    except OSError as error:
        found.add(Finding("shard-missing", f"cannot read it: {error.strerror or error}", shard.name))
        return _Tar()
    if checksum != shard.sha256:
        found.add(Finding("shard-checksum", "its SHA-256 is not the one in dataset.json", shard.name))
    return _Tar(path, members)


def _damaged(error: UserError, shard: Shard) -> Finding:
    """What the reader of tars says, with the key of the member that it stopped at."""
    parts, offset = member_parts(str(error.place.get("member", ""))), error.place.get("offset")
    what = error.what.removeprefix(f"'{shard.name}' ").removesuffix(f" (at byte {offset})")
    key = "" if isinstance(parts, str) else parts[0]
    place = offset if isinstance(offset, int) else None
    return Finding("tar-damaged", what, shard.name, key, place, mending=error.mend)


def _cut_off(opened: Opened, shard: Shard, index: ShardIndex | None) -> Finding | None:
    """Of a tar of another size: how much is there, and the first sample that is lost with the rest."""
    folder = tars_folder(opened)
    if folder is None or not (folder / shard.name).is_file():
        return None
    size = (folder / shard.name).stat().st_size
    if size == shard.bytes:
        return None
    what = f"{size:,} bytes, where dataset.json says {shard.bytes:,}"
    cut = np.zeros(0, bool) if index is None else (index.offset + index.size > size).any(axis=1)
    lost = np.flatnonzero(cut)
    if index is None or not len(lost):
        return Finding("shard-size", what, shard.name)
    row = int(lost[0])
    offset = int(index.offset[row].max())
    what += f": {len(lost):,} of its {shard.samples:,} samples are not whole, this is the first"
    return Finding("shard-size", what, shard.name, _key(index, row), offset)


def _key_hashes(index: ShardIndex, shard: Shard, found: Findings) -> NDArray[np.uint64] | None:
    try:
        return np.array([hash64(index.key(row).encode()) for row in range(len(index))], np.uint64)
    except UnicodeDecodeError as error:
        found.add(Finding("index-damaged", f"a key that is no UTF-8: {error.reason}", shard.name))
        return None


def _key(index: ShardIndex, row: int) -> str:
    """For a message about an index that may be damaged."""
    try:
        return index.key(row)
    except UnicodeDecodeError:
        return f"(row {row})"


def picture_prints(dataset: DatasetIndex, index: ShardIndex, bad: set[int]) -> NDArray[np.uint64]:
    """CRC-32 and size of each sample's image in 64 bits, [R]: equal for equal pictures; 0 where it is bad.

    Two pictures of equal size and CRC-32 are compared by their bytes later; until then this needs no reading.
    """
    prints = np.zeros(len(index), np.uint64)
    sizes, sums = index.size.tolist(), index.crc32.tolist()
    for row in range(len(index)):
        column = index.column(dataset.members.image, row)
        if column is not None and row not in bad:
            prints[row] = sums[row][column] << 32 | sizes[row][column] & 0xFFFFFFFF
    return prints
