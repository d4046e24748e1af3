"""Finds pictures that are there more than once, by their bytes: in one split, in two, with another label.

Shapes: T samples of all shards, P of them that may be twins.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.doctor_shards import Prints, ShardJob, open_dataset
from data_pipeline.draws import hash64, repeated
from data_pipeline.findings import Finding, Findings
from data_pipeline.index import DatasetIndex
from data_pipeline.masks import read_mask
from data_pipeline.shard_index import ShardIndex, read_shard_index


class Twin(NamedTuple):
    """A sample that may have a twin: where it is, the hash of its picture's bytes and of its target."""

    split: str
    shard: str
    key: str
    offset: int
    picture: int
    target: int


def check_twins(
    jobs: Sequence[ShardJob],
    prints: Sequence[Prints],
    read: Callable[[Sequence[ShardJob]], Iterator[list[Twin]]],
    found: Findings,
) -> None:
    """Compare the pictures of all shards; `read` gives what `read_twins` says of jobs, in their order."""
    again = candidates(jobs, prints)
    groups: dict[int, list[Twin]] = {}
    for twins in read(again):
        for twin in twins:
            groups.setdefault(twin.picture, []).append(twin)
    for group in groups.values():
        firsts: dict[str, Twin] = {}
        for twin in group:
            first = firsts.setdefault(twin.split, twin)
            if twin.split != group[0].split:
                found.add(_leak(twin, group[0]))
            elif first is not twin:
                found.add(_double(twin, first))


def candidates(jobs: Sequence[ShardJob], prints: Sequence[Prints]) -> list[ShardJob]:
    """The samples whose picture has the size and CRC-32 of another one's, by shard."""
    pictures = np.concatenate([np.empty(0, np.uint64), *(one.pictures for one in prints)])
    shared = repeated(pictures[pictures != 0])
    again = [
        job._replace(rows=np.flatnonzero(np.isin(one.pictures, shared)).astype(np.int64))
        for job, one in zip(jobs, prints, strict=True)
    ]
    return [job for job in again if job.rows is not None and len(job.rows)]


def check_keys(jobs: Sequence[ShardJob], prints: Sequence[Prints], found: Findings) -> None:
    """Keys that two samples of one split have: the certificate of an evaluation could not tell them apart."""
    for split in dict.fromkeys(job.split for job in jobs):
        pairs = [(job, one.keys) for job, one in zip(jobs, prints, strict=True) if job.split == split]
        shared = repeated(np.concatenate([keys for _, keys in pairs]))
        first: dict[str, str] = {}
        for job, keys in pairs:
            rows = np.flatnonzero(np.isin(keys, shared)).tolist()
            if not rows:
                continue
            opened = open_dataset(job.root)
            shard = opened.dataset.split(split).shards[job.position]
            index = read_shard_index(opened.store.index_path(shard), shard)
            for row in rows:
                key = index.key(row)
                if key in first:
                    found.add(Finding("key-twice", f"this key is in {first[key]}, too", shard.name, key))
                first.setdefault(key, shard.name)


def read_twins(job: ShardJob) -> list[Twin]:
    """Read the pictures and the targets of a job's rows."""
    opened = open_dataset(job.root)
    dataset = opened.dataset
    shard = dataset.split(job.split).shards[job.position]
    assert job.rows is not None
    index = read_shard_index(opened.store.index_path(shard), shard)
    descriptor = opened.store.open_shard(shard)
    twins = []
    try:
        for row in job.rows.tolist():
            column = index.column(dataset.members.image, row)
            assert column is not None
            offset, picture = int(index.offset[row, column]), _bytes(descriptor, index, row, column)
            target = _target(descriptor, dataset, index, row)
            twins.append(Twin(job.split, shard.name, index.key(row), offset, hash64(picture), target))
    finally:
        os.close(descriptor)
    return twins


def _bytes(descriptor: int, index: ShardIndex, row: int, column: int) -> bytes:
    return os.pread(descriptor, int(index.size[row, column]), int(index.offset[row, column]))


def _target(descriptor: int, dataset: DatasetIndex, index: ShardIndex, row: int) -> int:
    """Equal for equal labels, and for masks of equal values however they are stored."""
    if dataset.task != "segmentation":
        return hash64(np.ascontiguousarray(index.labels[row]).tobytes())
    column = index.column((dataset.members.target,), row)
    data = b"" if column is None else _bytes(descriptor, index, row, column)
    try:
        values: NDArray[np.uint8] = read_mask(data)
    except Exception:  # it was reported with its sample, whatever it is
        return hash64(data)
    return hash64(repr(values.shape).encode(), values.tobytes())


def _leak(twin: Twin, first: Twin) -> Finding:
    what = f"the same picture as {first.key!r} of {first.split} ({first.shard})"
    if twin.target != first.target:
        what += ", with another target"
    return Finding("leak", what, twin.shard, twin.key, twin.offset, first.key)


def _double(twin: Twin, first: Twin) -> Finding:
    code, what = "same-picture", f"the same picture as {first.key!r} ({first.shard})"
    if twin.target != first.target:
        code, what = "same-picture-other-label", f"{what}, with another target"
    return Finding(code, what, twin.shard, twin.key, twin.offset, first.key)
