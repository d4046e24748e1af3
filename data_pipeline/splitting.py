"""Divides samples into train and val by a ratio: seeded, stratified by what is to be learned, whole groups.

Rules, each a pure function of the samples in their fixed order, the fraction and the seed:

- *classes*: of each class by itself, round(fraction x its samples) are drawn at random for val.
- *labels* (any number of ones a sample): the label with the fewest undecided samples that carry it comes
  first and gets what val lacks of it, drawn evenly from all combinations of labels among those samples; then
  the next; last the samples that carry none. After K. Sechidis, G. Tsoumakas and I. Vlahavas, On the
  Stratification of Multi-Label Data (ECML PKDD 2011), but drawn evenly where they draw at random.
- *groups* (the pictures of a patient): in a random order, a group goes to val as a whole where that brings
  the counts of the classes (or of the labels and all samples) there closer to their share: where it lessens
  the sum of (count - fraction x total)^2 / total. The last group of a class or label stays in train. In a
  few more rounds groups go over or back by the same rule.

Shapes: N samples, C classes or labels, G groups.
"""

from __future__ import annotations

from math import fsum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.draws import IntArray, Purpose, bit_stream, permutation

PASSES = 4  # over all groups; later ones move next to nothing
BoolArray = NDArray[np.bool_]
Labels = NDArray[np.signedinteger[Any]]

# Second words of the counter in Purpose.PACKING: no two draws share a stream. 0 is the order of the shards.
CLASS_DRAW, GROUP_DRAW, LABEL_ORDER, LABEL_DRAW = 1, 2, 3, 4


def held_out(labels: Labels, groups: IntArray | None, *, val_fraction: float, seed: int) -> BoolArray:
    """Who is in val, bool [N], by the rule above that fits what is given."""
    if groups is not None:
        return held_out_groups(labels, groups, val_fraction=val_fraction, seed=seed)
    rule = held_out_of_classes if labels.ndim == 1 else held_out_of_labels
    return rule(labels, val_fraction=val_fraction, seed=seed)


def held_out_of_classes(labels: Labels, *, val_fraction: float, seed: int) -> BoolArray:
    """Who is in val, bool [N], by the class numbers `labels` [N]."""
    chosen = np.zeros(len(labels), np.bool_)
    by_class = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[by_class], prepend=-1))
    for rows in np.split(by_class, starts[1:]) if len(labels) else ():
        order = permutation(
            len(rows), bit_stream(seed, Purpose.PACKING, at=(CLASS_DRAW, int(labels[rows[0]])))
        )
        chosen[rows[order[: round(len(rows) * val_fraction)]]] = True
    return chosen


def held_out_of_labels(labels: Labels, *, val_fraction: float, seed: int) -> BoolArray:
    """Who is in val, bool [N], by `labels` [N, C]: 1, 0, or -1 where one is missing."""
    samples = len(labels)
    carried = labels == 1
    lacking = val_fraction * np.append(carried.sum(axis=0), samples)  # of each label in val; last: of all
    in_val = np.zeros(samples, np.bool_)
    undecided = np.ones(samples, np.bool_)
    shuffled = permutation(samples, bit_stream(seed, Purpose.PACKING, at=(LABEL_ORDER, 0)))
    spread = shuffled[np.argsort(_combinations(labels)[shuffled], kind="stable")]
    remaining = carried.sum(axis=0)
    while undecided.any():
        left = np.where(remaining > 0, remaining, samples + 1)
        label = int(np.argmin(left)) if remaining.any() else -1
        members = undecided if label < 0 else undecided & carried[:, label]
        rows = spread[members[spread]]
        wanted = min(max(round(float(lacking[label])), 0), len(rows))
        start = int(bit_stream(seed, Purpose.PACKING, at=(LABEL_DRAW, label + 1)).random_raw()) % len(rows)
        chosen = rows[(np.arange(wanted) * len(rows) + start) // max(wanted, 1)]
        in_val[chosen] = True
        undecided[rows] = False
        lacking -= np.append(carried[chosen].sum(axis=0), wanted)
        remaining = remaining - carried[rows].sum(axis=0)
    return in_val


def held_out_groups(labels: Labels, groups: IntArray, *, val_fraction: float, seed: int) -> BoolArray:
    """Who is in val, bool [N], by `labels` [N] or [N, C] and the numbers 0 to G - 1 of `groups` [N]."""
    rows, columns = _counted(labels)
    width = int(columns.max(initial=-1)) + 1
    cells, counts = np.unique(groups[rows] * width + columns, return_counts=True)
    totals = np.bincount(cells % width, weights=counts, minlength=width)
    weights = 1 / np.maximum(totals, 1)
    missing = val_fraction * totals
    in_train = totals.copy()
    ends = np.searchsorted(cells // width, np.arange(int(groups.max(initial=-1)) + 2))
    chosen = np.zeros(len(ends) - 1, np.bool_)
    order = permutation(len(chosen), bit_stream(seed, Purpose.PACKING, at=(GROUP_DRAW, 0)))
    for _ in range(PASSES):
        moved = False
        for group in order:
            span = slice(ends[group], ends[group + 1])
            kinds, sign = cells[span] % width, -1 if chosen[group] else 1
            here = sign * counts[span]
            change = weights[kinds] * here * (here - 2 * missing[kinds])
            if fsum(change.tolist()) < 0 and not bool((in_train[kinds] == here).any()):
                chosen[group] = not chosen[group]
                moved = True
                missing[kinds] -= here
                in_train[kinds] -= here
        if not moved:
            break
    in_val: BoolArray = chosen[groups]
    return in_val


def _combinations(labels: Labels) -> IntArray:
    """A number for each sample's combination of labels, equal where the labels are; int64 [N]."""
    code = np.zeros(len(labels), np.int64)
    for number, column in enumerate(labels.T):
        if number and number % 20 == 0:  # 3**20 x the samples still fits 64 bits
            code = np.unique(code, return_inverse=True)[1].astype(np.int64)
        code = code * 3 + column + 1
    return code


def _counted(labels: Labels) -> tuple[IntArray, IntArray]:
    """What is counted, as pairs of a sample and a kind: its class, or its labels and (kind C) itself."""
    if labels.ndim == 1:
        return np.arange(len(labels)), labels.astype(np.int64)
    rows, columns = np.nonzero(labels == 1)
    samples, kinds = labels.shape
    every = np.arange(samples)
    return np.concatenate([rows, every]), np.concatenate([columns, np.full(samples, kinds)])
