"""How often each sample occurs in a balanced epoch: whole numbers only, O(shards x classes) in memory.

Shapes: S shards, C classes, R rows (samples) of a shard, N samples of the split, n_c of them in class c.

A strength b from 0 (as they are) to 1 (every class equally often) gives class c the share n_c^(1 - b) of an
epoch of N samples: a whole number t_c of occurrences, one and the same in every epoch. They are dealt out to
the class's samples in the order of the split; dealing goes on from epoch to epoch where it stopped:

    sample k of class c occurs  floor(((k + 1) t_c + e t_c + r_c) / n_c) - floor((k t_c + e t_c + r_c) / n_c)
    times in epoch e, with r_c drawn once from 0 to n_c - 1.

So within a class no two samples differ by more than one, an epoch has exactly N samples, and of a class that
is thinned out every sample has had its turn after ceil(n_c / t_c) epochs. What a shard holds in an epoch, its
"virtual" samples, follows from the class counts before it; only its own labels say which rows they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.draws import IntArray, Purpose, bit_stream
from data_pipeline.fault import UserError

Labels = NDArray[Any]  # integers [R]: the class number of each row
MAX_SAMPLES = 1 << 39  # where the intermediate products of _scaled still fit 63 bits
LIMB = 17  # bits
DEALT_SHARDS = 32  # whose rows stay known: the lanes' current ones and their neighbours
TABLE_PART = 1 << 20  # entries of [S, C] that are worked on at a time


@dataclass(frozen=True, eq=False)
class Balance:
    """How much a split is balanced, and its labels: counted for all shards, in full for one at a time."""

    strength: float  # 0 as they are, 1 every class equally often
    class_table: IntArray  # [S, C] samples of each class in each shard
    labels_of: Callable[[int], Labels]  # by position of the shard in the split


class Rows(NamedTuple):
    """Which rows some virtual samples of a shard are."""

    rows: IntArray
    copies: IntArray  # 0, 1, 2 ... for the occurrences of one row in the epoch


class _Dealt(NamedTuple):
    """What an epoch has of a shard, in piles: layer j of them has a copy of each row that occurs > j times.

    A pile is made of the neighbouring layers that are equal, so there are few, however often a row occurs.
    """

    order: IntArray  # [R] rows, those that occur most often first: every layer is a head of it
    lows: IntArray  # [piles] number of the first layer, which is the copy number of its samples
    sizes: IntArray  # [piles] rows of a layer
    starts: IntArray  # [piles] virtual samples before the pile
    samples: int  # virtual samples of the shard


class Occurrences:
    """The balanced epochs of a split; pure but for `labels_of`, of which the latest answers are kept."""

    def __init__(self, balance: Balance, seed: int) -> None:
        table = np.asarray(balance.class_table, np.int64)
        self._labels_of = balance.labels_of
        self._before = np.zeros((len(table) + 1, table.shape[1]), np.int64)  # of each class, by shard
        np.cumsum(table, axis=0, out=self._before[1:])
        counts = self._before[-1]
        assert counts.sum() < MAX_SAMPLES, counts.sum()
        self._totals = class_totals(counts, balance.strength)
        # A class without samples is dealt nothing; it must not divide by zero either.
        self._counts = np.maximum(counts, 1)
        draws = bit_stream(seed, Purpose.BALANCE).random_raw(len(counts))
        self._offsets = (draws % self._counts.astype(np.uint64)).astype(np.int64)
        self._deal = lru_cache(maxsize=DEALT_SHARDS)(self._deal_shard)

    def shard_sizes(self, epoch: int) -> IntArray:
        """int64 [S]: virtual samples of each shard in this epoch; their sum is N."""
        sizes = np.empty(len(self._before) - 1, np.int64)
        part = max(1, TABLE_PART // max(1, len(self._counts)))
        for first in range(0, len(sizes), part):
            ranks = self._before[first : first + part + 1]
            dealt = self._dealt_before(epoch, ranks, slice(None))
            sizes[first : first + part] = np.diff(dealt, axis=0).sum(axis=1)
        return sizes

    def rows(self, epoch: int, shard: int, places: IntArray) -> Rows:
        """Which rows of the shard lie at these places, 0 <= place < its size in this epoch.

        Piled up, the rare classes' copies would follow one another at the end. A stride of the golden section
        spreads every stretch of the pile evenly over the shard, so that a block of any size has its share of
        each class, and copies lie apart.
        Source: Knuth, The Art of Computer Programming, volume 3, section 6.4 (Fibonacci hashing).
        """
        dealt = self._deal(epoch, shard)
        _, virtual = _scaled(places, _golden_stride(dealt.samples), 0, dealt.samples)
        pile = np.searchsorted(dealt.starts, virtual, side="right") - 1
        layer, within = np.divmod(virtual - dealt.starts[pile], dealt.sizes[pile])
        return Rows(dealt.order[within], dealt.lows[pile] + layer)

    def _deal_shard(self, epoch: int, shard: int) -> _Dealt:
        labels = np.asarray(self._labels_of(shard)).astype(np.intp, copy=False)
        here = self._before[shard + 1] - self._before[shard]
        assert np.array_equal(np.bincount(labels, minlength=len(here)), here), shard
        by_class = np.argsort(labels, kind="stable")
        firsts = np.cumsum(here) - here
        ranks = np.empty(len(labels), np.int64)
        ranks[by_class] = np.arange(len(labels)) - firsts[labels[by_class]]
        ranks += self._before[shard, labels]
        times = self._dealt_before(epoch, ranks + 1, labels) - self._dealt_before(epoch, ranks, labels)
        order = np.argsort(-times, kind="stable")
        heights, rows = np.unique(times[times > 0], return_counts=True)
        lows = np.concatenate([[0], heights[:-1]])
        sizes = rows[::-1].cumsum()[::-1]
        pile_samples = (heights - lows) * sizes
        return _Dealt(order, lows, sizes, np.cumsum(pile_samples) - pile_samples, int(times.sum()))

    def _dealt_before(self, epoch: int, ranks: IntArray, classes: Any) -> IntArray:
        """What is dealt before samples of these ranks in their classes, counted from the epoch's start."""
        totals, counts = self._totals[classes], self._counts[classes]
        _, turned = _scaled(totals, epoch % counts, self._offsets[classes], counts)
        return _scaled(ranks, totals, turned, counts)[0]


def class_table(labels: Iterable[Labels], classes: int) -> IntArray:
    """int64 [S, C]: samples of each class in each shard, from its labels; DATA where one is no class."""
    table = []
    for position, column in enumerate(labels):
        strangers = np.flatnonzero((column < 0) | (column >= classes))
        if len(strangers):
            row = int(strangers[0])
            raise UserError(
                f"sample {row} of shard {position} (both from 0) has the label {int(column[row])}, "
                f"the classes are 0 to {classes - 1}",
                mend="lockstep doctor names it; mend it at its source and make the data set again",
            )
        table.append(np.bincount(column, minlength=classes))
    return np.array(table, np.int64).reshape(-1, classes)


def class_totals(counts: IntArray, strength: float) -> IntArray:
    """int64 [C]: how often each class of n_c = counts[c] samples occurs in an epoch; they add up to N.

    A class that has samples occurs at least once. Decimal's logarithm and exponential are correctly rounded,
    so these numbers are the same on every machine; those of the C library are not.
    """
    assert 0 <= strength <= 1, strength
    shares: dict[int, int] = {0: 0}
    with localcontext() as context:
        context.prec = 50
        power = 1 - Decimal(strength)
        for count in sorted(set(counts.tolist()) - {0}):
            shares[count] = int((Decimal(count).ln() * power).exp() * 2**64)
    samples, whole = int(counts.sum()), sum(shares[count] for count in counts.tolist())
    # Rounding the running sum, not each share: what one class loses the next one gains, and the sum is exact.
    ends, running = [0], 0
    for count in counts.tolist():
        running += shares[count]
        ends.append((2 * samples * running + whole) // (2 * whole) if whole else 0)
    running_totals = np.array(ends, np.int64)
    return running_totals[1:] - running_totals[:-1]


def _scaled(numbers: IntArray, factor: Any, offset: Any, divisor: Any) -> tuple[IntArray, IntArray]:
    """divmod(numbers * factor + offset, divisor), exact where the product has up to 78 bits.

    By long division: the high part of `numbers` first, its remainder carried into the low part.
    """
    high, carried = np.divmod((numbers >> LIMB) * factor, divisor)
    low, remainder = np.divmod((carried << LIMB) + (numbers & ((1 << LIMB) - 1)) * factor + offset, divisor)
    return (high << LIMB) + low, remainder


def _golden_stride(count: int) -> int:
    """A step near the golden section of `count` that has no factor in common with it."""
    step = count * 2654435769 >> 32
    while gcd(step, count) != 1:
        step += 1
    return step
