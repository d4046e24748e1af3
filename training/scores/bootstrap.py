"""How far chance in the choice of the samples may have moved an area under a curve: 95 % intervals.

The percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). Samples
are drawn with all their labels, so that the interval of the mean over labels is right as well.
Shapes: N samples, C labels, R resamples, of which a part is worked on at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.scores.ranking import Areas, areas, rank
from training.tasks.task import Kept

BOUNDS = (2.5, 97.5)  # percent
PART = 1 << 18  # weights at a time: they and their sums stay in a core's cache
STREAM = 1 << 62  # second word of the key; those of data_pipeline.draws hold an epoch and are far smaller


def intervals(kept: Kept, *, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """For each area [low, high] of the "mean" over labels, and of each label in "classes"; None: undefined.

    A resample in which a score is not defined is left out for that label, and that label for its mean.
    """
    rankings = [rank(scores, targets) for scores, targets in zip(kept.outputs.T, kept.targets.T, strict=True)]
    found = np.full((len(Areas._fields), resamples, len(rankings)), np.nan)
    first = 0
    for weights_RN in resampled(len(kept.targets), resamples=resamples, seed=seed):
        last = first + len(weights_RN)
        for label, ranking in enumerate(rankings):
            found[:, first:last, label] = areas(ranking, weights_RN)
        first = last
    return {name: _summary(values_RC) for name, values_RC in zip(Areas._fields, found, strict=True)}


def resampled(samples: int, *, resamples: int, seed: int) -> Iterator[NDArray[np.int32]]:
    """How often each of N samples occurs in N draws with replacement: parts [R, N] of all the resamples.

    Draw i of resample r is number r N + i of one stream of `Generator.random`, which numpy keeps as it is.
    """
    draws = np.random.Generator(np.random.Philox(key=np.array([seed, STREAM], np.uint64)))
    part = max(1, PART // max(1, samples))
    for first in range(0, resamples, part):
        rows = min(part, resamples - first)
        drawn = (draws.random((rows, samples)) * samples).astype(np.int64)
        drawn += np.arange(rows)[:, None] * samples
        counts = np.bincount(drawn.ravel(), minlength=rows * samples)
        yield counts.astype(np.int32).reshape(rows, samples)


def _summary(values_RC: NDArray[np.float64]) -> dict[str, Any]:
    with warnings.catch_warnings():
        # A resample in which no label is defined has no mean; it stays NaN and is left out.
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        means_R = np.nanmean(values_RC, axis=1)
    return {"mean": _interval(means_R), "classes": [_interval(values_R) for values_R in values_RC.T]}


def _interval(values_R: NDArray[np.float64]) -> list[float] | None:
    known = values_R[~np.isnan(values_R)]
    if not len(known):
        return None
    low_high: list[float] = np.percentile(known, BOUNDS).tolist()
    return low_high
