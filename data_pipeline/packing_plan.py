"""Cuts a source into tars before any is written, and says what the plan is made of, to know it again.

Shapes: N items of the source.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from data_pipeline.draws import IntArray, Purpose, bit_stream, permutation
from data_pipeline.index import FORMAT
from data_pipeline.items import Item, Source
from data_pipeline.packed_shard import ShardJob, Storage

LOOKERS, LOOKED_AT = 16, 4096  # threads that look up sizes (a network's disk answers slowly), files a turn


@dataclass(frozen=True)
class PackingOptions:
    """What the bytes of a data set depend on besides its source.

    A tar is closed at `shard_samples` samples or about `shard_bytes` bytes, whichever comes first.
    """

    seed: int
    shard_samples: int
    shard_bytes: int
    storage: Storage


@dataclass(frozen=True)
class Plan:
    """The tars to write, and everything that decides their bytes."""

    jobs: tuple[ShardJob, ...]
    identity: dict[str, Any]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the identity in hex."""
        return sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def shards(self) -> dict[str, int]:
        """The number of tars of each split."""
        return dict(Counter(job.split for job in self.jobs))

    def share(self, part: tuple[int, int]) -> tuple[ShardJob, ...]:
        """The jobs of the i-th of n parts (from 1); sizes differ by one at most."""
        number, parts = part
        total = len(self.jobs)
        return self.jobs[total * (number - 1) // parts : total * number // parts]


def make_plan(source: Source, destination: Path, options: PackingOptions) -> Plan:
    """Cut every split, in a random order fixed by the seed, into tars: neighbours are a random sample."""
    sizes, times = _looked_up(source.items)
    rows: dict[str, list[int]] = {}
    for row, item in enumerate(source.items):
        rows.setdefault(item.split, []).append(row)
    jobs: list[ShardJob] = []
    for number, split in enumerate(sorted(rows)):
        members = sorted(rows[split], key=lambda row: source.items[row].key)
        order = permutation(len(members), bit_stream(options.seed, Purpose.PACKING, at=(0, number)))
        shuffled = np.array(members, np.int64)[order]
        for count, chunk in enumerate(_chunks(shuffled, sizes, options)):
            items = tuple(source.items[row] for row in chunk)
            path = destination / shard_name(split, count)
            jobs.append(ShardJob(path, split, items, source.task, source.classes, options.storage))
    return Plan(tuple(jobs), _identity(source, options, sizes, times))


def shard_name(split: str, number: int) -> str:
    """The file name of a tar."""
    return f"{split}-{number:06d}.tar"


def _chunks(rows: IntArray, sizes: IntArray, options: PackingOptions) -> Iterable[list[int]]:
    """Rows of `sizes` [N], cut where a tar is full."""
    side = options.storage.resize_shorter
    # Pictures that are made smaller take about a byte a pixel, at most; before they are, nobody knows better.
    most = side * side if side else np.iinfo(np.int64).max
    chunk: list[int] = []
    filled = 0
    for row, size in zip(rows.tolist(), np.minimum(sizes[rows], most).tolist(), strict=True):
        if chunk and (len(chunk) >= options.shard_samples or filled + size > options.shard_bytes):
            yield chunk
            chunk, filled = [], 0
        chunk.append(row)
        filled += size
    if chunk:
        yield chunk


def _looked_up(items: tuple[Item, ...]) -> tuple[IntArray, IntArray]:
    """Bytes and times of change (ns) of each item's files, [N] each; zeros for what is not there."""
    turns = [items[start : start + LOOKED_AT] for start in range(0, len(items), LOOKED_AT)]
    with ThreadPoolExecutor(LOOKERS) as threads:
        found = list(threads.map(_look_up, turns))
    both = np.concatenate(found) if found else np.zeros((0, 2), np.int64)
    return both[:, 0], both[:, 1]


def _look_up(items: tuple[Item, ...]) -> IntArray:
    both = np.zeros((len(items), 2), np.int64)
    for row, item in enumerate(items):
        for path in (item.path, item.target) if isinstance(item.target, Path) else (item.path,):
            try:
                found = path.stat()
            except OSError:
                continue  # whoever reads it says what is wrong
            both[row] += found.st_size, found.st_mtime_ns
    return both


def _identity(source: Source, options: PackingOptions, sizes: IntArray, times: IntArray) -> dict[str, Any]:
    listing = sha256()
    for item, size, time in zip(source.items, sizes.tolist(), times.tolist(), strict=True):
        line = f"{item.split}\0{item.key}\0{item.file}\0{item.target}\0{size}\0{time}\0\0"
        listing.update(line.encode("utf-8", "surrogateescape"))
    return {
        "format": FORMAT,
        "pillow": PIL.__version__,  # another one may encode other bytes
        "task": source.task,
        "classes": list(source.classes),
        "samples": len(source.items),
        "listing": listing.hexdigest(),
        "seed": options.seed,
        "shard_samples": options.shard_samples,
        "shard_bytes": options.shard_bytes,
        **asdict(options.storage),
    }
