"""When a run has learned what it can: by the scores of its evaluations alone."""

from __future__ import annotations

from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config.train import EarlyStop
from training.early_stop import Waiting, after_score, why_over


def waited(values, *, spec, lower=False):
    """The counts after each of the values."""
    waiting, counts = Waiting(), []
    for value in values:
        waiting = after_score(waiting, value, spec=spec, metric="score", lower_is_better=lower)
        counts.append(waiting.evaluations)
    return counts


CASES = {
    "every step up is progress": ([1, 2, 3], 0.0, False, [0, 0, 0]),
    "the same again is none": ([1, 1, 1], 0.0, False, [0, 1, 2]),
    "down is progress where lower is better": ([3, 2, 2.5, 1], 0.0, True, [0, 0, 1, 0]),
    "a slow climb counts once it adds up": ([0, 0.6, 1.2, 1.8, 2.4], 1.0, False, [0, 1, 0, 1, 0]),
    "exactly the threshold is none": ([0, 1], 1.0, False, [0, 1]),
    "no score and nan are none": ([None, float("nan"), 1, None, float("inf")], 0.0, False, [1, 2, 0, 1, 2]),
}


@pytest.mark.parametrize("name", CASES)
def test_evaluations_without_progress_are_counted(name):
    values, threshold, lower, counts = CASES[name]
    assert waited(values, spec=EarlyStop(patience=9, threshold=threshold), lower=lower) == counts


scores = st.lists(st.none() | st.floats(-10, 10), max_size=12)


@given(values=scores, patience=st.integers(1, 5), threshold=st.floats(0, 3))
def test_up_for_one_is_down_for_the_other(values, patience, threshold):
    spec = EarlyStop(patience=patience, threshold=threshold)
    mirrored = [None if value is None else -value for value in values]
    assert waited(values, spec=spec) == waited(mirrored, spec=spec, lower=True)


@given(values=scores, cut=st.integers(0, 12), patience=st.integers(1, 5))
def test_a_run_that_was_resumed_in_between_waits_as_long(values, cut, patience):
    from dataclasses import asdict

    spec = EarlyStop(patience=patience)

    def take(waiting, value):
        return after_score(waiting, value, spec=spec, metric="score", lower_is_better=False)

    before = reduce(take, values[:cut], Waiting())
    resumed = Waiting(**asdict(before))
    assert reduce(take, values[cut:], resumed) == reduce(take, values, Waiting())


def test_a_run_is_over_once_its_patience_is_and_not_with_more_of_it():
    waiting = Waiting("accuracy", 0.5, 3)
    said = why_over(waiting, EarlyStop(patience=3, threshold=0.001))
    assert said == (
        "accuracy has not got better by more than 0.001 in 3 evaluations (train.early_stop); "
        "it is 0.5000 at best"
    )
    assert "never defined" in why_over(Waiting("auroc", None, 3), EarlyStop(patience=3))
    assert why_over(waiting, EarlyStop(patience=4)) == ""
    assert why_over(waiting, None) == ""


def test_another_score_is_waited_for_anew():
    spec = EarlyStop(patience=3)
    waiting = after_score(Waiting("loss", 0.1, 2), 0.7, spec=spec, metric="accuracy", lower_is_better=False)
    assert waiting == Waiting("accuracy", 0.7, 0)
