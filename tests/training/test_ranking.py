"""Areas under curves and thresholds: scikit-learn's on any scores, None where there is nothing to say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from training.scores.ranking import areas, best_threshold, rank

# Few different scores, so that there are ties, and some that differ in the last bit.
SCORES = st.sampled_from(
    [-np.inf, -3.0, -1.0, 0.0, -0.0, 1e-7, 1.0, float(np.nextafter(np.float32(1), 2)), 9.0]
)
ROW = st.tuples(SCORES, st.sampled_from([-1, 0, 0, 1]), st.integers(0, 3))


def arrays_of(rows):
    scores, targets, weights = zip(*rows, strict=True) if rows else ((), (), ())
    return np.array(scores, np.float32), np.array(targets, np.int8), np.array(weights, np.int64)


def repeated_rows(scores, targets, weights):
    """What scikit-learn sees: known rows, as often as they count, and a finite score in place of -inf."""
    times = np.where(targets >= 0, weights, 0)
    return np.repeat(np.maximum(scores, -100), times), np.repeat(targets, times)


@settings(deadline=None)
@given(st.lists(ROW, max_size=30))
def test_areas_are_those_of_scikit_learn_on_the_rows_as_often_as_they_count(rows):
    scores, targets, weights = arrays_of(rows)
    found = areas(rank(scores, targets), np.stack([weights, np.ones_like(weights)]))
    for row, times in enumerate([weights, np.ones_like(weights)]):
        seen, truth = repeated_rows(scores, targets, times)
        one_class = len(np.unique(truth)) < 2
        assert np.isnan(found.auroc[row]) == one_class
        assert np.isnan(found.average_precision[row]) == (not (truth == 1).any())
        if not one_class:
            assert found.auroc[row] == pytest.approx(roc_auc_score(truth, seen), abs=1e-12)
        if (truth == 1).any():
            expected = average_precision_score(truth, seen)
            assert found.average_precision[row] == pytest.approx(expected, abs=1e-12)


def test_areas_of_many_rows_are_those_of_scikit_learn():
    draws = np.random.default_rng(0)
    targets = (draws.random(50_000) < 0.03).astype(np.int8)
    scores = np.round(draws.normal(size=50_000) + targets, 3).astype(np.float32)
    found = areas(rank(scores, targets), np.ones((1, 50_000), np.int32))
    assert found.auroc.item() == pytest.approx(roc_auc_score(targets, scores), abs=1e-12)
    assert found.average_precision.item() == pytest.approx(
        average_precision_score(targets, scores), abs=1e-12
    )


def test_a_constant_score_has_half_the_area_and_a_single_sample_none():
    two = areas(rank(np.zeros(2, np.float32), np.array([0, 1], np.int8)), np.ones((1, 2), np.int64))
    assert (two.auroc.item(), two.average_precision.item()) == (0.5, 0.5)
    one = areas(rank(np.zeros(1, np.float32), np.array([1], np.int8)), np.ones((1, 1), np.int64))
    assert np.isnan(one.auroc.item())
    assert one.average_precision.item() == 1.0


def test_scores_that_are_no_numbers_rank_nothing():
    scores, targets = np.array([1, np.nan, 2], np.float32), np.array([0, 1, 1], np.int8)
    found = areas(rank(scores, targets), np.ones((1, 3), np.int64))
    assert np.isnan(found.auroc.item())
    assert np.isnan(found.average_precision.item())
    assert best_threshold(scores, targets) == 0.5
    # Where the label is missing, what was said of it does not matter.
    known = areas(rank(scores, np.array([0, -1, 1], np.int8)), np.ones((1, 3), np.int64))
    assert known.auroc.item() == 1.0


def best_f1(probabilities, targets):
    """By trying every probability, and nothing at all."""
    tried = [f1_score(targets, probabilities >= at, zero_division=0.0) for at in np.unique(probabilities)]
    return max(tried, default=0.0)


LOGITS = st.floats(-200, 200, width=32) | st.sampled_from([-88.0, -1e-7, 0.0, 1e-7, 15.0, 16.0, 17.0, 40.0])


@settings(deadline=None)
@given(st.lists(st.tuples(LOGITS, st.sampled_from([-1, 0, 1])), max_size=25))
@example([(-200.0, 1)])  # its probability is zero
@example([(-88.0, 1), (-200.0, 0)])  # its probability is the smallest that is not
@example([(1e-7, 1), (-1e-7, 0)])  # neighbours: nothing lies between them
def test_the_threshold_has_the_best_f1_compared_in_32_or_64_bits(rows):
    logits = torch.tensor([logit for logit, _ in rows], dtype=torch.float32)
    targets = np.array([target for _, target in rows], np.int8)
    probabilities = logits.sigmoid().numpy()
    threshold = json.loads(json.dumps(best_threshold(probabilities, targets)))
    known = targets >= 0
    truth = targets[known]
    if not (truth == 1).any():
        assert threshold == 0.5
        return
    for kind in (np.float32, np.float64):
        said = probabilities[known].astype(kind) >= kind(threshold)
        assert f1_score(truth, said) == pytest.approx(best_f1(probabilities[known], truth), abs=1e-12)
    assert torch.equal(
        logits.sigmoid() >= threshold, torch.from_numpy(probabilities >= np.float64(threshold))
    )


def test_the_threshold_lies_between_what_is_said_and_what_is_not():
    probabilities = np.array([0.75, 0.25, 0.125], np.float32)
    assert best_threshold(probabilities, np.array([1, 0, 0], np.int8)) == 0.5
    assert best_threshold(probabilities, np.array([1, 1, 0], np.int8)) == 0.1875
    # Everything is said: halfway to zero.
    assert best_threshold(probabilities, np.array([1, 1, 1], np.int8)) == 0.0625
    # 2/3 with the first, and with all three: the higher threshold.
    assert best_threshold(np.array([0.8, 0.6, 0.4, 0.2], np.float32), np.array([1, 0, 0, 1], np.int8)) == (
        pytest.approx(0.7)
    )
