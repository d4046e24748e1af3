"""Chooses some of many samples at even distances, and says in which shards they lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.draws import IntArray


def spread(total: int, count: int) -> IntArray:
    """At most `count` numbers below `total` at even distances, int64."""
    count = min(count, total)
    return np.arange(count, dtype=np.int64) * total // max(count, 1)


def rows_by_shard(numbers: IntArray, shard_samples: Sequence[int]) -> list[IntArray]:
    """The rows in each shard, int64 [S] arrays, of ascending sample numbers over all of them."""
    ends = np.cumsum(shard_samples)
    parts = np.split(numbers, np.searchsorted(numbers, ends[:-1]))
    return [part - end + size for part, end, size in zip(parts, ends, shard_samples, strict=True)]
