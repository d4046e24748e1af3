"""Fetches the bytes of samples by their numbers: one index look-up, neighbours in one pread, each checked."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.batch import RawSample
from data_pipeline.draws import IntArray
from data_pipeline.fault import UserError
from data_pipeline.index import DatasetIndex, Shard
from data_pipeline.shard_index import ShardIndex, read_shard_index
from data_pipeline.store import RemoteFolder, Store

OPEN_SHARDS = 32  # a batch touches at most two shards a lane; memory stays O(open shards), not O(samples)
GAP = 16 << 10  # bytes between two members that it costs less to read than to skip
RUN = 4 << 20  # bytes of one pread, at most (unless one member is larger)


class _Opened(NamedTuple):
    descriptor: int
    shard: Shard
    rows: ShardIndex


class _Extent(NamedTuple):
    """A member that is wanted: where it lies, and for which sample."""

    offset: int
    size: int
    crc32: int
    number: int
    is_mask: bool


class ShardReader:
    """Reads samples of one split. Not shared: each reader worker has its own, so nothing is locked.

    Without `targets` neither labels nor masks are read.
    """

    def __init__(
        self,
        store: Store,
        dataset: DatasetIndex,
        split: str,
        *,
        open_shards: int = OPEN_SHARDS,
        targets: bool = True,
    ) -> None:
        self._store, self._dataset, self._open_shards = store, dataset, open_shards
        self._targets = targets
        self.samples = dataset.split(split).samples
        self._shards = dataset.split(split).shards
        self._ends = np.cumsum(dataset.split(split).shard_samples)
        self._opened: OrderedDict[int, _Opened] = OrderedDict()

    def read(self, number: int) -> RawSample:
        """The sample with this number; a broken one has its `fault`. DATA where its shard is missing."""
        return self.read_many(np.array([number], np.int64))[0]

    def read_many(self, numbers: IntArray) -> list[RawSample]:
        """The samples with these numbers, in this order; each shard is read from front to back."""
        positions = np.searchsorted(self._ends, numbers, side="right")
        found: dict[int, RawSample] = {}
        for position in np.unique(positions):
            opened = self._open(int(position))
            first = int(self._ends[position]) - opened.shard.samples
            wanted = np.unique(numbers[positions == position])
            found |= self._read_shard(opened, first, wanted)
        return [found[int(number)] for number in numbers]

    def _read_shard(self, opened: _Opened, first: int, numbers: IntArray) -> dict[int, RawSample]:
        samples: dict[int, RawSample] = {}
        extents: list[_Extent] = []
        for number in numbers.tolist():
            samples[number], wanted = self._located(opened, number - first, number)
            extents += wanted
        for run in _runs(sorted(extents)):
            start, end = run[0].offset, max(one.offset + one.size for one in run)
            block = memoryview(os.pread(opened.descriptor, end - start, start))
            for extent in run:
                data = block[extent.offset - start : extent.offset - start + extent.size]
                samples[extent.number] = _with_member(samples[extent.number], extent, data)
        if isinstance(self._store, RemoteFolder) and any(one.fault for one in samples.values()):
            self._store.forget(opened.shard)  # if the cache has rotted, the next start fetches it anew
        return samples

    def _located(self, opened: _Opened, row: int, number: int) -> tuple[RawSample, list[_Extent]]:
        index, members = opened.rows, self._dataset.members
        masked = self._targets and self._dataset.task == "segmentation"
        image = index.column(members.image, row)
        mask = index.column((members.target,), row) if masked else None
        label: Any = None
        if self._targets and not masked:
            label = int(index.labels[row]) if index.labels.ndim == 1 else np.array(index.labels[row], np.int8)
        offset = int(index.offset[row, image]) if image is not None else 0
        raw = RawSample(number, index.key(row), b"", None, label, opened.shard.name, offset)
        if image is None or (masked and mask is None):
            missing = " or ".join(members.image) if image is None else members.target
            return raw._replace(fault=_fault(raw, f"has no member {missing}")), []
        columns = [(image, False)] if mask is None else [(image, False), (mask, True)]
        return raw, [
            _Extent(
                int(index.offset[row, column]),
                int(index.size[row, column]),
                int(index.crc32[row, column]),
                number,
                is_mask,
            )
            for column, is_mask in columns
        ]

    def _open(self, position: int) -> _Opened:
        if position in self._opened:
            self._opened.move_to_end(position)
            return self._opened[position]
        shard = self._shards[position]
        index = read_shard_index(self._store.index_path(shard), shard)
        self._opened[position] = _Opened(self._store.open_shard(shard), shard, index)
        if len(self._opened) > self._open_shards:
            os.close(self._opened.popitem(last=False)[1].descriptor)
        return self._opened[position]

    def close(self) -> None:
        """Close every shard that is open."""
        while self._opened:
            os.close(self._opened.popitem()[1].descriptor)


def _runs(extents: list[_Extent]) -> list[list[_Extent]]:
    """Neighbours together: what lies closer than GAP is read at once, up to RUN bytes."""
    runs: list[list[_Extent]] = []
    for extent in extents:
        if runs:
            run = runs[-1]
            behind = extent.offset - (run[-1].offset + run[-1].size)
            if behind <= GAP and extent.offset + extent.size - run[0].offset <= RUN:
                run.append(extent)
                continue
        runs.append([extent])
    return runs


def _with_member(raw: RawSample, extent: _Extent, data: memoryview) -> RawSample:
    if raw.fault is not None:
        return raw
    if len(data) != extent.size or zlib.crc32(data) != extent.crc32:
        return raw._replace(fault=_fault(raw, f"is not the {extent.size} bytes that were packed"))
    return raw._replace(mask=data) if extent.is_mask else raw._replace(image=data)


def _fault(raw: RawSample, what: str) -> UserError:
    return UserError(
        f"'{raw.shard}': sample {raw.key!r} {what}",
        mend="copy the shard again, or make the data set again; lockstep doctor lists all that is wrong",
        place={"shard": raw.shard, "member": raw.key, "offset": raw.offset},
    )
