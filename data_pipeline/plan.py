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
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.balance import Balance, Occurrences
from data_pipeline.draws import IntArray, Purpose, bit_stream, permutation


class Layout(NamedTuple):
    """One epoch's order of shards: position p lies in `order[k]` for the first k with p < ends[k]."""

    order: IntArray  # [S] shard numbers
    sizes: IntArray  # [S] samples of each shard in this epoch, by shard number
    ends: IntArray  # [S] positions, cumulative
    rotation: int  # added to every position, modulo N, so that the dropped tail differs from epoch to epoch


class Drawn(NamedTuple):
    """Samples in the order of training; a balanced epoch has some several times and tells them apart."""

    numbers: IntArray  # [samples] global sample numbers of the split
    copies: IntArray | None  # [samples] 0, 1, 2 ... for the occurrences of one number; None: not balanced

    def take(self, places: Any) -> Drawn:
        """Those at these places: indices or a slice."""
        return Drawn(self.numbers[places], None if self.copies is None else self.copies[places])


class Work(NamedTuple):
    """One micro-batch for one process: what a reader worker is asked for."""

    epoch: int
    step: int  # optimizer steps from the start of the run, from 0
    piece: int  # number of this micro-batch in the process's share of the global batch
    pieces: int  # how many micro-batches its share has; in training all processes have as many
    numbers: IntArray  # [samples] global sample numbers of the split
    valid: bool  # False: stand-ins, where a process has nothing left of its share; they must not count
    first: int = 0  # position of numbers[0] in the global batch; the others follow it
    copies: IntArray | None = None  # [samples] as Drawn.copies
    partners: IntArray | None = None  # [samples] numbers of what each is mixed with; None: nothing is mixed
    partner_copies: IntArray | None = None  # [samples] as Drawn.copies


class Plan:
    """The training order of a split with the given shard sizes [S] (samples); see the module's drawing.

    With `balance` the same is done with the shards as the epoch has them: its occurrences of their samples.
    """

    def __init__(
        self,
        shard_samples: IntArray,
        *,
        seed: int,
        global_batch: int,
        lanes: int,
        shuffle_block: int,
        balance: Balance | None = None,
    ) -> None:
        assert global_batch % lanes == 0, (global_batch, lanes)
        self.shard_samples = np.asarray(shard_samples, np.int64)
        self.shard_starts = np.cumsum(self.shard_samples) - self.shard_samples
        self.samples = int(self.shard_samples.sum())  # of an epoch too, whether it is balanced or not
        self.seed, self.global_batch = seed, global_batch
        self.lanes, self.shuffle_block = lanes, shuffle_block
        self.lane_length = self.samples // lanes
        self.steps_per_epoch = self.samples // global_batch
        assert balance is None or np.array_equal(balance.class_table.sum(axis=1), self.shard_samples)
        self._occurrences = Occurrences(balance, seed) if balance else None
        # A lane's neighbouring batches share a block, and epochs meet at their seam: both are worth keeping.
        self._layout = lru_cache(maxsize=2)(self._draw_layout)
        self._block = lru_cache(maxsize=4 * lanes)(self._draw_block)
        self._batch = lru_cache(maxsize=64)(self._draw_batch)  # every reader thread asks for the same few

    def batch(self, step: int) -> IntArray:
        """The global sample numbers, int64 [B] (read-only), of the run's optimizer step `step` (from 0)."""
        return self._batch(step).numbers

    def drawn(self, step: int) -> Drawn:
        """The same with the copies of a balanced epoch (read-only)."""
        return self._batch(step)

    def _draw_batch(self, step: int) -> Drawn:
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        width = self.global_batch // self.lanes
        first = in_epoch * width
        batch = _joined([self._lane(epoch, lane, first, first + width) for lane in range(self.lanes)])
        for array in batch:
            if array is not None:
                array.flags.writeable = False
        return batch

    def _lane(self, epoch: int, lane: int, first: int, last: int) -> Drawn:
        size = self.shuffle_block
        blocks = range(first // size, (last - 1) // size + 1)
        start = first - blocks[0] * size
        drawn = _joined([self._block(epoch, lane, block) for block in blocks])
        return drawn.take(slice(start, start + last - first))

    def _draw_block(self, epoch: int, lane: int, block: int) -> Drawn:
        start = block * self.shuffle_block
        length = min(self.shuffle_block, self.lane_length - start)
        first = lane * self.lane_length + start
        order = permutation(length, bit_stream(self.seed, Purpose.BLOCK_ORDER, epoch, at=(lane, block)))
        return self._samples(epoch, range(first, first + length)).take(order)

    def _draw_layout(self, epoch: int) -> Layout:
        order = permutation(len(self.shard_samples), bit_stream(self.seed, Purpose.SHARD_ORDER, epoch))
        rotation = int(bit_stream(self.seed, Purpose.ROTATION, epoch).random_raw()) % self.samples
        sizes = self._occurrences.shard_sizes(epoch) if self._occurrences else self.shard_samples
        return Layout(order, sizes, np.cumsum(sizes[order]), rotation)

    def _samples(self, epoch: int, positions: range) -> Drawn:
        """What lies at these positions of the epoch, before they are shuffled."""
        layout = self._layout(epoch)
        rotated = (np.arange(positions.start, positions.stop) + layout.rotation) % self.samples
        place = np.searchsorted(layout.ends, rotated, side="right")
        shard = layout.order[place]
        in_shard = rotated - (layout.ends[place] - layout.sizes[shard])
        if self._occurrences is None:
            return Drawn(self.shard_starts[shard] + in_shard, None)
        seams = [0, *(np.flatnonzero(np.diff(place)) + 1).tolist(), len(place)]
        parts = []
        for first, last in pairwise(seams):
            one = int(shard[first])
            rows = self._occurrences.rows(epoch, one, in_shard[first:last])
            parts.append(Drawn(self.shard_starts[one] + rows.rows, rows.copies))
        return _joined(parts)


def _joined(parts: list[Drawn]) -> Drawn:
    copies = [part.copies for part in parts if part.copies is not None]
    return Drawn(np.concatenate([part.numbers for part in parts]), np.concatenate(copies) if copies else None)


def share(count: int, part: int, parts: int) -> range:
    """The `part`-th of `parts` near-equal consecutive shares of range(count); the first are the larger."""
    small, larger = divmod(count, parts)
    start = part * small + min(part, larger)
    return range(start, start + small + (part < larger))


def training_work(
    plan: Plan, *, steps: range, process: int, processes: int, micro_batch: int, mixing: bool = False
) -> Iterator[Work]:
    """What `process` reads in the given optimizer steps, cut into micro-batches of near-equal size.

    Every process computes as many micro-batches as the one with the largest share, so that whatever they do
    together in a forward pass, they do equally often. Near-equal, so that no micro-batch has a single sample
    without need: BatchNorm cannot train on one. Where a share has fewer samples than there are micro-batches,
    the last ones are stand-ins, a pair if that is allowed, which do not count.

    With `mixing`, neighbours in the global batch are each other's partners, whichever processes have them;
    the last of an odd batch is its own.
    """
    stand_ins = np.arange(min(2, micro_batch)) % plan.global_batch
    for step in steps:
        batch = plan.drawn(step)
        mine = share(plan.global_batch, process, processes)
        pieces = -(-len(share(plan.global_batch, 0, processes)) // micro_batch)
        for piece in range(pieces):
            part = share(len(mine), piece, pieces)
            here = np.asarray(mine[part.start : part.stop]) if part else stand_ins
            partners = np.where(here ^ 1 < plan.global_batch, here ^ 1, here)
            drawn, mixed = batch.take(here), batch.take(partners) if mixing else None
            yield Work(
                step // plan.steps_per_epoch,
                step,
                piece,
                pieces,
                drawn.numbers,
                valid=bool(part),
                first=int(here[0]),
                copies=drawn.copies,
                partners=mixed.numbers if mixed else None,
                partner_copies=mixed.copies if mixed else None,
            )


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
