"""Fetches the bytes of a sample by its number: one index look-up, one pread a member, each checked."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np

from data_pipeline.batch import RawSample
from data_pipeline.fault import UserError
from data_pipeline.index import ShardIndex, Split, index_path, read_shard_index
from data_pipeline.plan import Work

OPEN_SHARDS = 32  # a batch touches at most two shards a lane; memory stays O(open shards), not O(samples)


class ShardReader:
    """Reads samples of one split. Not shared: each reader worker has its own, so nothing is locked."""

    def __init__(self, root: Path, split: Split, *, open_shards: int = OPEN_SHARDS) -> None:
        self._root, self._split, self._open_shards = root, split, open_shards
        self._ends = np.cumsum(split.shard_samples)
        self._opened: OrderedDict[int, tuple[int, ShardIndex]] = OrderedDict()

    def read(self, number: int, work: Work) -> RawSample:
        """The sample with this number; DATA where its bytes are missing or not those that were packed."""
        position = int(np.searchsorted(self._ends, number, side="right"))
        shard = self._split.shards[position]
        row = number - int(self._ends[position]) + shard.samples
        descriptor, index = self._open(position)
        members: dict[str, bytes] = {}
        for column, extension in enumerate(index.extensions):
            offset, size = int(index.offset[row, column]), int(index.size[row, column])
            if offset == 0:
                continue
            data = os.pread(descriptor, size, offset)
            if len(data) != size or zlib.crc32(data) != int(index.crc32[row, column]):
                raise UserError(
                    f"'{shard.name}': {index.keys[row]}.{extension} is not the {size} bytes that were packed",
                    mend="copy the shard again from where it was whole, or pack the data set again",
                    place={"shard": shard.name, "member": f"{index.keys[row]}.{extension}", "offset": offset},
                )
            members[extension] = data
        first = min((int(offset) for offset in index.offset[row] if offset), default=0)
        return RawSample(work, number, index.keys[row], members, shard.name, first)

    def _open(self, position: int) -> tuple[int, ShardIndex]:
        if position in self._opened:
            self._opened.move_to_end(position)
            return self._opened[position]
        shard = self._split.shards[position]
        path = self._root / shard.name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(descriptor).st_size
        except OSError as error:
            raise UserError(
                f"cannot open shard '{path}': {error.strerror}",
                mend="put the shard back, or pack the data set again",
                place={"shard": shard.name},
            ) from None
        if found != shard.bytes:
            os.close(descriptor)
            raise UserError(
                f"shard '{path}' has {found} bytes, dataset.json says {shard.bytes}",
                mend="copy the shard again, or pack the data set again",
                place={"shard": shard.name},
            )
        try:
            self._opened[position] = (descriptor, read_shard_index(index_path(path), shard))
        except UserError:
            os.close(descriptor)
            raise
        if len(self._opened) > self._open_shards:
            self._close(self._opened.popitem(last=False)[1])
        return self._opened[position]

    def close(self) -> None:
        """Close every shard that is open."""
        while self._opened:
            self._close(self._opened.popitem()[1])

    @staticmethod
    def _close(opened: tuple[int, ShardIndex]) -> None:
        os.close(opened[0])
