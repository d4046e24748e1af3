"""Lengths as people say them, and the optimizer steps that they come to."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.config.durations import in_steps, read_duration

COUNTS = st.integers(1, 10**6)


def steps_of(duration, *, steps=1000, steps_per_epoch=100, global_batch=64):
    return in_steps(
        read_duration(duration), steps=steps, steps_per_epoch=steps_per_epoch, global_batch=global_batch
    )


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        (500, "500st"),
        ("500", "500st"),
        (" 500 st ", "500st"),
        ("1step", "1st"),
        ("2 steps", "2st"),
        ("3ep", "3ep"),
        ("3 epochs", "3ep"),
        ("0.5epoch", "0.5ep"),
        ("20000sp", "20000sp"),
        ("1 sample", "1sp"),
        ("10%", "10%"),
        ("2.5 %", "2.5%"),
        (0, "0st"),
    ],
)
def test_every_way_to_write_a_length_has_one_spelling_in_the_end(written, canonical):
    assert read_duration(written) == canonical
    assert read_duration(canonical) == canonical


@pytest.mark.parametrize(
    "written",
    [
        *("", "ep", "-1", "-1ep", "1.5", "1.5st", "0.5sp", ".5ep", "5.ep", "1e3", "3 eps", "3pe", "3 ep 2"),
        *(
            "9" * 400 + "ep",
            "0." + "3" * 400 + "ep",
            "nan",
            "inf",
            "infep",
            "\uff11ep",
            "\u0663ep",
            "0x10",
            "1_000",
            "1,5ep",
            "3ep\n4ep",
            "10%%",
            "ep3",
        ),
        *(None, True, False, [], {}, float("nan"), float("inf"), -3, 1.5),
    ],
)
def test_what_is_no_length_is_refused(written):
    with pytest.raises(ValueError, match=r"is no (duration|whole number)"):
        read_duration(written)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("7", 7),
        ("0", 0),
        ("3ep", 300),
        ("0.5ep", 50),
        ("10%", 100),
        ("0.1%", 1),
        ("200%", 2000),
        ("64sp", 1),
        ("65sp", 2),
        ("0sp", 0),
        ("640000sp", 10000),
    ],
)
def test_a_length_comes_to_optimizer_steps(duration, steps):
    assert steps_of(duration) == steps


@settings(deadline=None)
@given(st.integers(0, 1000), COUNTS, COUNTS, COUNTS)
def test_whole_epochs_and_percents_come_to_no_step_too_many(number, steps, steps_per_epoch, global_batch):
    run = {"steps": steps, "steps_per_epoch": steps_per_epoch, "global_batch": global_batch}
    assert steps_of(f"{number}ep", **run) == number * steps_per_epoch
    assert steps_of("100%", **run) == steps
    assert abs(steps_of(f"{number}%", **run) - number * steps / 100) <= 0.5


@settings(deadline=None)
@given(st.integers(0, 10**9), COUNTS)
def test_samples_are_rounded_up_to_whole_steps(samples, global_batch):
    assert steps_of(f"{samples}sp", global_batch=global_batch) == -(-samples // global_batch)


def test_a_tenth_of_an_epoch_of_thirty_steps_is_three_steps():
    assert steps_of("0.1ep", steps_per_epoch=30) == 3
    assert steps_of("0.7ep", steps_per_epoch=10) == 7
    assert steps_of("29%", steps=100) == 29
