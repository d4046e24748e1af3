"""Scores that follow from how often each class was there, was said, and was both.

Counts are whole numbers in float64 or int64. A fraction of nothing is None: the class has no such score.
Shapes: C classes or labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_CONFUSION = 100  # classes; beyond, a matrix is too large for a record and nobody reads it

Scores = list[float | None]


class ClassCounts(NamedTuple):
    """How often each class was the truth, was said, and was both: [C] each."""

    truth: NDArray[Any]
    said: NDArray[Any]
    right: NDArray[Any]


def class_counts(confusion_CC: NDArray[Any]) -> ClassCounts:
    """The counts in a confusion matrix whose rows are the truth and whose columns are what was said."""
    return ClassCounts(confusion_CC.sum(axis=1), confusion_CC.sum(axis=0), confusion_CC.diagonal())


def shown(confusion_CC: NDArray[Any]) -> list[list[int]] | None:
    """The matrix as whole numbers; None where it has more than MAX_CONFUSION classes."""
    if len(confusion_CC) > MAX_CONFUSION:
        return None
    rows: list[list[int]] = confusion_CC.astype(np.int64).tolist()
    return rows


def recall(counts: ClassCounts) -> Scores:
    """Of the samples of each class, the share that was said to be."""
    return _fractions(counts.right, counts.truth)


def precision(counts: ClassCounts) -> Scores:
    """Of what was said to be of each class, the share that is."""
    return _fractions(counts.right, counts.said)


def f1(counts: ClassCounts) -> Scores:
    """The harmonic mean of recall and precision, which is also the Dice coefficient of each class."""
    return _fractions(2 * counts.right, counts.truth + counts.said)


def iou(counts: ClassCounts) -> Scores:
    """Intersection over union of each class, the Jaccard index."""
    return _fractions(counts.right, counts.truth + counts.said - counts.right)


def fraction(part: float, whole: float) -> float | None:
    """`part` of `whole`; None of nothing."""
    return float(part) / float(whole) if whole else None


def mean(scores: Sequence[float | None]) -> float | None:
    """The mean of the scores that are defined; None where none is."""
    known = [score for score in scores if score is not None]
    return float(np.mean(known)) if known else None


def _fractions(parts: NDArray[Any], wholes: NDArray[Any]) -> Scores:
    return [fraction(part, whole) for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True)]
