"""Which samples form global batch t of epoch e, and which of them a process reads: pure, O(shards) in memory.

Shapes: S shards, N samples of the split, B samples of a *global* batch, L lanes, K samples of a block.

    epoch e:  the shards in a random order, rotated at random        [0 ........................ N)
    lanes:    cut at sample granularity into L equal spans           [ lane 0 )[ lane 1 ) ... tail
    blocks:   in a lane, every K consecutive positions are permuted  [K)[K)[K)...
    batch t:  B / L consecutive positions of every lane              process r of W takes the r-th share

Lanes let several machines stream disjoint shards. The number of processes, loader workers and the micro-batch
enter only in `share`, after the batch is fixed: that is the first promise, one order on any topology.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data_pipeline.draws import IntArray, Purpose, bit_stream, permutation


class Layout(NamedTuple):
    """One epoch's order of shards: position p lies in `order[k]` for the first k with p < ends[k]."""

    order: IntArray  # [S] shard numbers
    ends: IntArray  # [S] positions, cumulative
    rotation: int  # added to every position, modulo N, so that the dropped tail differs from epoch to epoch


class Work(NamedTuple):
    """One micro-batch for one process: what a reader worker is asked for."""

    epoch: int
    step: int  # optimizer steps from the start of the run, from 0
    piece: int  # number of this micro-batch in the process's share of the global batch
    pieces: int  # how many micro-batches this share has
    numbers: IntArray  # [samples] global sample numbers of the split
    valid: bool  # False: a stand-in for a process whose share is empty; it must not count


class Plan:
    """The training order of a split with the given shard sizes [S] (samples); see the module's drawing."""

    def __init__(
        self, shard_samples: IntArray, *, seed: int, global_batch: int, lanes: int, shuffle_block: int
    ) -> None:
        assert global_batch % lanes == 0, (global_batch, lanes)
        self.shard_samples = np.asarray(shard_samples, np.int64)
        self.shard_starts = np.cumsum(self.shard_samples) - self.shard_samples
        self.samples = int(self.shard_samples.sum())
        self.seed, self.global_batch = seed, global_batch
        self.lanes, self.shuffle_block = lanes, shuffle_block
        self.lane_length = self.samples // lanes
        self.steps_per_epoch = self.samples // global_batch
        # A lane's neighbouring batches share a block, and epochs meet at their seam: both are worth keeping.
        self._layout = lru_cache(maxsize=2)(self._draw_layout)
        self._block = lru_cache(maxsize=4 * lanes)(self._draw_block)
        self._batch = lru_cache(maxsize=64)(self._draw_batch)  # every reader thread asks for the same few

    def batch(self, step: int) -> IntArray:
        """The global sample numbers, int64 [B] (read-only), of the run's optimizer step `step` (from 0)."""
        return self._batch(step)

    def _draw_batch(self, step: int) -> IntArray:
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        width = self.global_batch // self.lanes
        first = in_epoch * width
        rows = [self._lane_positions(epoch, lane, first, first + width) for lane in range(self.lanes)]
        numbers = self._numbers(epoch, np.concatenate(rows))
        numbers.flags.writeable = False
        return numbers

    def _lane_positions(self, epoch: int, lane: int, first: int, last: int) -> IntArray:
        size = self.shuffle_block
        blocks = range(first // size, (last - 1) // size + 1)
        positions = np.concatenate([block * size + self._block(epoch, lane, block) for block in blocks])
        start = first - blocks[0] * size
        return lane * self.lane_length + positions[start : start + last - first]

    def _draw_block(self, epoch: int, lane: int, block: int) -> IntArray:
        length = min(self.shuffle_block, self.lane_length - block * self.shuffle_block)
        return permutation(length, bit_stream(self.seed, Purpose.BLOCK_ORDER, epoch, at=(lane, block)))

    def _draw_layout(self, epoch: int) -> Layout:
        order = permutation(len(self.shard_samples), bit_stream(self.seed, Purpose.SHARD_ORDER, epoch))
        rotation = int(bit_stream(self.seed, Purpose.ROTATION, epoch).random_raw()) % self.samples
        return Layout(order, np.cumsum(self.shard_samples[order]), rotation)

    def _numbers(self, epoch: int, positions: IntArray) -> IntArray:
        layout = self._layout(epoch)
        rotated = (positions + layout.rotation) % self.samples
        place = np.searchsorted(layout.ends, rotated, side="right")
        shard = layout.order[place]
        in_shard = rotated - (layout.ends[place] - self.shard_samples[shard])
        numbers: IntArray = self.shard_starts[shard] + in_shard
        return numbers


def share(count: int, part: int, parts: int) -> range:
    """The `part`-th of `parts` near-equal consecutive shares of range(count); the first are the larger."""
    small, larger = divmod(count, parts)
    start = part * small + min(part, larger)
    return range(start, start + small + (part < larger))


def training_work(
    plan: Plan, *, steps: range, process: int, processes: int, micro_batch: int
) -> Iterator[Work]:
    """What `process` reads in the given optimizer steps, cut into micro-batches of near-equal size.

    Near-equal, so that no micro-batch has a single sample without need: BatchNorm cannot train on one. A
    process whose share is empty (more processes than samples in a global batch) gets one stand-in sample that
    does not count, because it must take part in the reduction of gradients.
    """
    for step in steps:
        batch = plan.batch(step)
        mine = share(len(batch), process, processes)
        numbers = batch[mine.start : mine.stop] if mine else batch[[0, 0]]
        pieces = -(-len(numbers) // micro_batch)
        for piece in range(pieces):
            part = share(len(numbers), piece, pieces)
            epoch = step // plan.steps_per_epoch
            yield Work(epoch, step, piece, pieces, numbers[part.start : part.stop], valid=bool(mine))


def evaluation_work(samples: int, *, batch: int, process: int, processes: int) -> Iterator[Work]:
    """What `process` evaluates: whole batches of a fixed cut of range(samples), every sample in exactly one.

    The cut does not depend on the processes, so a batch gives the same numbers wherever it is computed; the
    last one may be smaller, and a process may have none: no collective runs inside an evaluation.
    """
    batches = -(-samples // batch)
    mine = share(batches, process, processes)
    for number in mine:
        numbers = np.arange(number * batch, min((number + 1) * batch, samples), dtype=np.int64)
        yield Work(0, number, number - mine.start, len(mine), numbers, valid=True)
