"""When a run evaluates and saves: pure functions of the step, but for the clock."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from training.cadence import SaveClock, cadence_of, kept_steps
from training.command import read_request
from training.schedules import RunLength

every = st.none() | st.integers(1, 7)


def config_of(**options):
    return read_request([f"--{name.replace('_', '-')}={value}" for name, value in options.items()]).config


@given(
    steps=every, epochs=every, weights=every, keep=every, evaluates=st.integers(1, 3), epoch=st.integers(1, 5)
)
def test_any_of_the_cadences_saves_and_every_evaluation_does(steps, epochs, weights, keep, evaluates, epoch):
    config = config_of(
        **{
            "checkpoint.every_steps": steps,
            "checkpoint.every_epochs": epochs,
            "checkpoint.weights_every_epochs": weights,
            "checkpoint.keep_every": None if keep is None else f"{keep}ep",
            "eval.every_epochs": evaluates,
        }
    )
    last = 23
    cadence = cadence_of(config, RunLength(40, epoch, 8), last=last)
    for done in range(1, last + 1):
        evaluated = done % (evaluates * epoch) == 0 or done == last
        due = [steps, *(each and each * epoch for each in (epochs, weights, keep))]
        assert cadence.evaluates_after(done - 1) == evaluated
        assert cadence.saves_after(done - 1) == (evaluated or any(one and done % one == 0 for one in due))


def test_checkpoints_are_kept_by_steps_epochs_and_parts_of_the_run_but_never_less_than_a_step():
    length = RunLength(40, 5, 8)
    lengths = {"none": None, "3": 3, "2ep": 10, "10%": 4, "20sp": 3, "0.1%": 1}
    for text, steps in lengths.items():
        assert kept_steps(config_of(**{"checkpoint.keep_every": text}), length) == steps, text


def test_the_clock_is_due_after_its_minutes_and_counts_anew_after_a_save():
    clock = SaveClock(0.1 / 60)
    assert not clock.due
    time.sleep(0.12)
    assert clock.due
    assert clock.due, "until it is told"
    clock.saved()
    assert not clock.due
    assert not SaveClock(None).due
