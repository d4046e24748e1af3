"""Bootstrap intervals: a slow loop's, over sample numbers and scikit-learn, whatever the parts worked on."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from training.scores import bootstrap
from training.scores.bootstrap import intervals, resampled
from training.tasks.task import Kept

SAMPLES, LABELS, RESAMPLES = 40, 4, 60


@pytest.fixture(scope="module")
def kept():
    """Scores with ties, missing labels; of the third label one positive, of the last none."""
    draws = np.random.default_rng(3)
    targets = (draws.random((SAMPLES, LABELS)) < 0.3).astype(np.int8)
    outputs = np.round(draws.normal(size=(SAMPLES, LABELS)) + targets, 1).astype(np.float32)
    targets[:, 2] = 0
    targets[7, 2] = 1
    targets[:, 3] = 0
    targets[draws.random(targets.shape) < 0.1] = -1
    targets[7, 2] = 1
    return Kept(outputs, targets)


def drawn(seed):
    """Sample numbers [resamples, samples], by the words of `resampled`."""
    bits = np.random.Philox(key=np.array([seed, 2**62], np.uint64))
    numbers = [
        [int(u * SAMPLES) for u in row] for row in np.random.Generator(bits).random((RESAMPLES, SAMPLES))
    ]
    return np.array(numbers)


def slow_areas(kept, numbers):
    """[2, labels] of one resample: NaN where scikit-learn has no such score."""
    found = np.full((2, LABELS), np.nan)
    for label in range(LABELS):
        truth, scores = kept.targets[numbers, label], kept.outputs[numbers, label]
        truth, scores = truth[truth >= 0], scores[truth >= 0]
        if len(np.unique(truth)) == 2:
            found[0, label] = roc_auc_score(truth, scores)
        if (truth == 1).any():
            found[1, label] = average_precision_score(truth, scores)
    return found


def test_the_weights_are_how_often_each_sample_was_drawn():
    weights = np.concatenate(list(resampled(SAMPLES, resamples=RESAMPLES, seed=5)))
    assert weights.tolist() == [np.bincount(row, minlength=SAMPLES).tolist() for row in drawn(5)]


@pytest.mark.parametrize("part", [1, 3 * SAMPLES, 7 * SAMPLES + 1, 1 << 18])
def test_the_intervals_are_those_of_a_loop_over_scikit_learn(kept, part, monkeypatch):
    monkeypatch.setattr(bootstrap, "PART", part)
    values = np.stack([slow_areas(kept, numbers) for numbers in drawn(5)])
    found = intervals(kept, resamples=RESAMPLES, seed=5)
    assert list(found) == ["auroc", "average_precision"]
    for area, name in enumerate(found):
        of_labels = values[:, area]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            means = np.nanmean(of_labels, axis=1)
        assert found[name]["mean"] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1e-12)
        for label in range(3):
            defined = of_labels[~np.isnan(of_labels[:, label]), label]
            assert 0 < len(defined) <= RESAMPLES
            expected = np.percentile(defined, [2.5, 97.5])
            assert found[name]["classes"][label] == pytest.approx(expected, abs=1e-12)
        assert found[name]["classes"][3] is None


def test_the_rare_label_of_this_data_is_left_out_of_some_resamples(kept):
    assert any((numbers != 7).all() for numbers in drawn(5))


def test_equal_seeds_draw_equal_resamples_and_others_do_not(kept):
    first = intervals(kept, resamples=RESAMPLES, seed=5)
    np.random.seed(1)
    assert intervals(kept, resamples=RESAMPLES, seed=5) == first
    assert intervals(kept, resamples=RESAMPLES, seed=6) != first
    large = [intervals(kept, resamples=3, seed=seed) for seed in (2**64 - 1, 2**64 - 2)]
    assert large[0] != large[1]


def test_labels_are_drawn_together():
    draws = np.random.default_rng(0)
    targets = np.repeat((draws.random((200, 1)) < 0.4).astype(np.int8), 5, axis=1)
    outputs = np.repeat(draws.normal(size=(200, 1)).astype(np.float32), 5, axis=1) + targets
    for area in intervals(Kept(outputs, targets), resamples=100, seed=0).values():
        assert area["mean"] == pytest.approx(area["classes"][0], abs=1e-12)


def test_the_interval_is_as_wide_as_theory_says():
    # DeLong et al., 1988: the variance of an AUROC from what each positive and each negative adds to it.
    draws = np.random.default_rng(1)
    targets = np.repeat(np.array([0, 1], np.int8), [400, 200])
    outputs = (draws.normal(size=600) + targets).astype(np.float32)
    higher = outputs[targets == 1][:, None] > outputs[targets == 0]
    deviation = np.sqrt(higher.mean(axis=1).var(ddof=1) / 200 + higher.mean(axis=0).var(ddof=1) / 400)
    found = intervals(Kept(outputs[:, None], targets[:, None]), resamples=2000, seed=0)["auroc"]["classes"][0]
    center = higher.mean()
    assert found == pytest.approx([center - 1.96 * deviation, center + 1.96 * deviation], abs=0.2 * deviation)


@pytest.mark.parametrize("samples", [0, 1])
def test_what_is_never_defined_has_no_interval(samples):
    kept = Kept(np.zeros((samples, 2), np.float32), np.zeros((samples, 2), np.int8))
    found = intervals(kept, resamples=10, seed=0)
    assert found == {name: {"mean": None, "classes": [None, None]} for name in ("auroc", "average_precision")}


def test_intervals_are_json(kept):
    found = intervals(kept, resamples=10, seed=0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
