"""What a label's ranking of the samples is worth: areas under its curves, and the threshold of its best F1.

The areas take weights, that is, how often each sample counts: resampling asks for them a thousand times, so
a label is sorted once and each weighting costs two cumulative sums. The scores themselves have weights of 1.
Shapes: N samples, K samples whose label is known, P positives among them, G groups of samples of equal score
that hold a positive, R weightings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

UNDECIDED = 0.5  # the threshold where no sample says what a better one is


@dataclass(frozen=True, eq=False)
class Ranking:
    """The known samples of one label by falling score."""

    samples: NDArray[np.int64]  # [K]
    positives: NDArray[np.int64]  # [P], of the samples, in the same order
    # [G]: a group is samples[start:end], and its positives are positives[first:last].
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    firsts: NDArray[np.int64]
    lasts: NDArray[np.int64]


class Areas(NamedTuple):
    """Under the curves of a label, float64 [R]; NaN where a weighting leaves it undefined."""

    auroc: NDArray[np.float64]  # without a positive or without a negative
    average_precision: NDArray[np.float64]  # without a positive


def rank(scores_N: NDArray[Any], targets_N: NDArray[Any]) -> Ranking:
    """Sort the samples of one label; targets are 1, 0, or -1 where the label is missing.

    A score that is no number has no place in an order: then no sample counts as known.
    """
    samples_K = _known(scores_N, targets_N)
    order_K = np.argsort(-scores_N[samples_K], kind="stable")
    samples_K = samples_K[order_K]
    positive_K = targets_N[samples_K] == 1
    edges = _edges(scores_N[samples_K])
    before = np.concatenate([[0], np.cumsum(positive_K)])[edges]
    holds = np.flatnonzero(np.diff(before))
    return Ranking(
        samples_K,
        samples_K[positive_K],
        edges[holds],
        edges[holds + 1],
        before[holds],
        before[holds + 1],
    )


def areas(ranking: Ranking, weights_RN: NDArray[Any]) -> Areas:
    """Area under the receiver operating characteristic, and average precision, under each weighting.

    AUROC is the share of pairs of a positive and a negative that are in order, a tie counting half
    (Hanley and McNeil, 1982): up to its division it is whole numbers. Average precision is the mean over the
    positives of the precision at their score, without interpolation.
    """
    total = _cumulated(weights_RN, ranking.samples)
    positive = _cumulated(weights_RN, ranking.positives)
    positives = positive[:, -1]
    negatives = total[:, -1] - positives
    first, last = positive.take(ranking.firsts, axis=1), positive.take(ranking.lasts, axis=1)
    start, end = total.take(ranking.starts, axis=1), total.take(ranking.ends, axis=1)
    in_group = last - first
    precisions = (in_group * (last / np.maximum(end, 1))).sum(axis=1)
    # Of the negatives those that rank higher twice, those of the same score once.
    above = (start - first) + (end - last)
    pairs = 2 * positives * negatives - (in_group * above).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return Areas(pairs / (2 * positives * negatives), precisions / positives)


def best_threshold(probabilities_N: NDArray[np.float32], targets_N: NDArray[Any]) -> float:
    """The threshold t such that `probability >= t` has the best F1; of equally good ones the highest.

    It lies halfway to the next lower probability, where the last bit of a probability cannot matter, and is
    a float32 value, so that comparing in float32 or in float64 is the same. UNDECIDED without a positive.
    """
    samples_K = _known(probabilities_N, targets_N)
    order_K = np.argsort(-probabilities_N[samples_K], kind="stable")
    positive_K = targets_N[samples_K][order_K] == 1
    if not positive_K.any():
        return UNDECIDED
    falling_K = probabilities_N[samples_K][order_K]
    said = _edges(falling_K)[1:]
    f1 = 2 * np.cumsum(positive_K)[said - 1] / (positive_K.sum() + said)
    count = said[np.argmax(f1)]
    lowest = falling_K[count - 1]
    below = falling_K[count] if count < len(falling_K) else np.float32(0)
    middle = np.float32((np.float64(lowest) + np.float64(below)) / 2)
    return float(middle if middle > below else lowest)


def _known(scores_N: NDArray[Any], targets_N: NDArray[Any]) -> NDArray[np.int64]:
    known = np.flatnonzero(targets_N >= 0)
    return known[:0] if np.isnan(scores_N[known]).any() else known


def _edges(falling_K: NDArray[Any]) -> NDArray[np.int64]:
    """Where groups of equal values begin, and at last the number of values."""
    if not len(falling_K):
        return np.zeros(1, np.int64)
    return np.concatenate([[0], np.flatnonzero(falling_K[1:] != falling_K[:-1]) + 1, [len(falling_K)]])


def _cumulated(weights_RN: NDArray[Any], samples: NDArray[np.int64]) -> NDArray[np.int64]:
    """Weight of the first 0, 1, 2 ... of `samples`, [R, their number + 1]."""
    sums = np.zeros((len(weights_RN), len(samples) + 1), np.int64)
    np.cumsum(weights_RN.take(samples, axis=1), axis=1, out=sums[:, 1:])
    return sums
