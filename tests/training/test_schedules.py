"""The learning rate is a pure function of the step, and the one that torch's schedulers give."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as torchs

from training.config import OptimConfig, UserError
from training.config.schedule import Plateau, Schedule
from training.schedules import (
    SCHEDULES,
    PlateauState,
    RunLength,
    after_evaluation,
    check_schedule,
    rate_at,
)

RUN = RunLength(steps=100, steps_per_epoch=10, global_batch=64)
PEAKS = st.floats(1e-6, 10)
LENGTHS = st.integers(1, 30)
SHARES = st.floats(0, 1)
GAMMAS = st.floats(0.05, 1)


def rates(config, *, steps=RUN.steps, peak=None, run=RUN):
    run = run._replace(steps=steps)
    return [rate_at(step, config.lr if peak is None else peak, config, run) for step in range(steps)]


def of_torch(make, peak, steps):
    """The rates that a scheduler of torch gives when it is stepped once an optimizer step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def same_as_torch(spec, make, peak, steps=60, *, warmup=0):
    config = OptimConfig(lr=peak, schedule=spec, warmup=warmup)
    found = rates(config, steps=warmup + steps)[warmup:]
    assert found == pytest.approx(of_torch(make, peak, steps), rel=1e-9, abs=1e-13 * peak)


# The warm-up.


def test_the_warm_up_rises_in_equal_steps_and_reaches_the_peak_with_its_last():
    found = rates(OptimConfig(lr=1.0, warmup=4), steps=20)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == 1.0


@pytest.mark.parametrize(("warmup", "steps"), [("0.5ep", 5), ("7%", 7), ("129sp", 3), ("1ep", 10)])
def test_the_warm_up_is_as_long_as_it_says(warmup, steps):
    found = rates(OptimConfig(lr=1.0, warmup=warmup, schedule="constant"))
    assert found.index(1.0) == steps - 1
    assert found[0] == 1 / steps


def test_a_warm_up_longer_than_the_run_is_no_division_by_zero():
    assert rates(OptimConfig(lr=1.0, warmup=3), steps=3) == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates(OptimConfig(lr=1.0, warmup=30), steps=3)[-1] == pytest.approx(0.1)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 90), PEAKS, SHARES)
def test_warm_up_and_cosine_keep_their_bits(warmup, steps, lr, share):
    """Golden runs were recorded with this formula."""
    config = OptimConfig(lr=lr, warmup=warmup, schedule={"cosine": {"eta_min": share * lr}})
    for step, found in enumerate(rates(config, steps=steps)):
        if step < warmup:
            assert found == lr * (step + 1) / warmup
        else:
            done = (step - warmup) / max(1, steps - warmup)
            end = share * lr
            assert found == end + (lr - end) * (1 + math.cos(math.pi * done)) / 2


# The courses.


def test_there_is_a_course_for_every_name_in_a_recipe():
    assert SCHEDULES.keys() == Schedule.model_fields.keys() - {"own"}


@settings(deadline=None)
@given(PEAKS, st.floats(0.01, 1), SHARES, LENGTHS)
def test_linear_is_torchs(peak, start, end, length):
    spec = {"start_factor": start, "end_factor": end, "total_iters": length}
    same_as_torch({"linear": spec}, lambda one: torchs.LinearLR(one, start, end, length), peak)


@settings(deadline=None)
@given(PEAKS, LENGTHS, GAMMAS)
def test_step_is_torchs(peak, size, gamma):
    spec = {"step_size": size, "gamma": gamma}
    same_as_torch({"step": spec}, lambda one: torchs.StepLR(one, size, gamma), peak)


@settings(deadline=None)
@given(PEAKS, st.lists(st.integers(0, 70), min_size=1, max_size=6), GAMMAS)
def test_multi_step_is_torchs(peak, milestones, gamma):
    spec = {"milestones": milestones, "gamma": gamma}
    same_as_torch({"multi_step": spec}, lambda one: torchs.MultiStepLR(one, sorted(milestones), gamma), peak)


@settings(deadline=None)
@given(PEAKS, GAMMAS)
def test_exponential_is_torchs(peak, gamma):
    spec = {"gamma": gamma, "every": 1}
    same_as_torch({"exponential": spec}, lambda one: torchs.ExponentialLR(one, gamma), peak)


@settings(deadline=None)
@given(PEAKS, LENGTHS, SHARES)
def test_cosine_is_torchs_up_to_its_end_and_level_behind_it(peak, length, share):
    end = share * peak
    spec = {"cosine": {"T_max": length, "eta_min": end}}
    same_as_torch(spec, lambda one: torchs.CosineAnnealingLR(one, length, end), peak, steps=length + 1)
    assert rates(OptimConfig(lr=peak, schedule=spec))[length:] == pytest.approx([end] * (100 - length))


@settings(deadline=None)
@given(PEAKS, LENGTHS, st.integers(1, 3), SHARES)
def test_cosine_restarts_is_torchs(peak, length, longer, share):
    end = share * peak
    spec = {"cosine_restarts": {"T_0": length, "T_mult": longer, "eta_min": end}}
    same_as_torch(spec, lambda one: torchs.CosineAnnealingWarmRestarts(one, length, longer, end), peak)


@settings(deadline=None)
@given(PEAKS, LENGTHS, st.floats(0.1, 5))
def test_polynomial_is_torchs(peak, length, power):
    spec = {"polynomial": {"total_iters": length, "power": power}}
    same_as_torch(spec, lambda one: torchs.PolynomialLR(one, length, power), peak)


CYCLES = st.fixed_dictionaries(
    {
        "pct_start": st.floats(0.01, 0.5),
        "anneal_strategy": st.sampled_from(["cos", "linear"]),
        "div_factor": st.floats(1, 100),
        "final_div_factor": st.floats(1, 1e5),
        "three_phase": st.booleans(),
    }
)


@settings(deadline=None)
@given(PEAKS, st.integers(2, 60), CYCLES)
def test_one_cycle_is_torchs(peak, steps, spec):
    def make(optimizer):
        return torchs.OneCycleLR(optimizer, peak, total_steps=steps, cycle_momentum=False, **spec)

    # torch divides by zero where the rise is one step long.
    assume(spec["pct_start"] * steps != 1)
    same_as_torch({"one_cycle": spec}, make, peak, steps=steps)


def test_one_cycle_may_rise_for_most_of_the_run_or_for_one_step():
    found = rates(OptimConfig(lr=1.0, schedule={"one_cycle": {"pct_start": 0.9}}))
    assert found.index(max(found)) == 89
    assert rates(OptimConfig(lr=1.0, schedule={"one_cycle": {"pct_start": 0.01}}))[0] == 1.0
    assert len(rates(OptimConfig(lr=1.0, schedule="one_cycle"), steps=1)) == 1


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
def test_what_has_no_length_of_its_own_lasts_from_the_warm_up_to_the_end(schedule):
    found = rates(OptimConfig(lr=1.0, warmup="20%", schedule=schedule))
    assert found[20] == 1.0
    assert found[60] == pytest.approx(0.5)
    assert 0 < found[99] < 0.02
    assert rate_at(100, 1.0, OptimConfig(warmup="20%", schedule=schedule), RUN) == 0


@pytest.mark.parametrize(
    ("spec", "warmup"), [({"step": {"step_size": 7}}, 5), ({"multi_step": {"milestones": [3, 9]}}, 11)]
)
def test_a_course_begins_behind_the_warm_up(spec, warmup):
    without = rates(OptimConfig(lr=1.0, schedule=spec), steps=30)
    assert rates(OptimConfig(lr=1.0, schedule=spec, warmup=warmup), steps=30 + warmup)[warmup:] == without


def test_lengths_are_steps_epochs_samples_or_percents():
    for length in ("20", "2ep", "20%", "1280sp", "1217sp"):
        config = OptimConfig(lr=1.0, schedule={"step": {"step_size": length, "gamma": 0.5}})
        assert rates(config) == [0.5 ** (step // 20) for step in range(100)]


def test_exponential_drops_once_an_epoch_unless_told_otherwise():
    config = OptimConfig(lr=1.0, schedule={"exponential": {"gamma": 0.9}})
    assert rates(config) == [0.9 ** (step // 10) for step in range(100)]


COURSES = {
    "constant": {},
    "linear": {},
    "step": {"step_size": "3ep"},
    "multi_step": {"milestones": ["30%", "80%"]},
    "exponential": {"gamma": 0.5},
    "cosine": {},
    "cosine_restarts": {"T_0": "1ep", "T_mult": 2},
    "polynomial": {"power": 2},
    "one_cycle": {},
    "plateau": {},
}


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(COURSES)), st.integers(1, 300), st.integers(1, 50), st.integers(0, 20))
def test_every_course_stays_between_nothing_and_the_peak_in_any_run(name, steps, steps_per_epoch, warmup):
    run = RunLength(steps, steps_per_epoch, 64)
    config = OptimConfig(lr=0.3, schedule={name: COURSES[name]}, warmup=0 if name == "one_cycle" else warmup)
    assert all(0 <= rate <= 0.3 * (1 + 1e-12) for rate in rates(config, steps=steps, run=run))


def test_every_group_of_parameters_runs_the_same_course_from_its_own_peak():
    for name, arguments in COURSES.items():
        config = OptimConfig(lr=1.0, schedule={name: arguments})
        small = rates(config, peak=0.01)
        assert small == pytest.approx([0.01 * rate for rate in rates(config)]), name


# What does not fit.


def refusal(config, run=RUN):
    with pytest.raises(UserError) as caught:
        check_schedule(config, run)
    assert caught.value.code == "CONFIG"
    assert caught.value.what.startswith("optim.")
    return caught.value.what


@pytest.mark.parametrize(
    "spec",
    [
        {"step": {"step_size": 0}},
        {"step": {"step_size": "0.1%"}},
        {"exponential": {"gamma": 0.5, "every": "0ep"}},
        {"cosine": {"T_max": "0.01ep"}},
        {"cosine_restarts": {"T_0": "0sp"}},
        {"linear": {"total_iters": 0}},
        {"polynomial": {"total_iters": 0}},
    ],
)
def test_a_period_of_no_step_is_refused_by_its_name(spec):
    ((_, arguments),) = spec.items()
    assert any(f" {name} " in refusal(OptimConfig(schedule=spec)) for name in arguments)


def test_one_cycle_takes_no_warm_up_in_front():
    assert "one_cycle" in refusal(OptimConfig(schedule="one_cycle", warmup="1ep"))
    check_schedule(OptimConfig(schedule="one_cycle", warmup="0ep"), RUN)


def test_three_phases_that_do_not_fit_into_the_run_are_refused():
    spec = {"one_cycle": {"three_phase": True, "pct_start": 0.6}}
    assert "0.6" in refusal(OptimConfig(schedule=spec))


# A user's own.


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write a module beside the user; the name of its function as a schedule."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = f"rates_of_{tmp_path.name}"

    def write(text):
        (tmp_path / f"{module}.py").write_text(text, encoding="utf-8")
        return f"{module}:rate"

    return write


def test_a_function_of_the_users_gets_the_step_behind_the_warm_up_and_its_arguments(own):
    path = own("def rate(step, *, steps, lr, power=1):\n    return lr * (1 - step / steps) ** power\n")
    config = OptimConfig(lr=0.5, warmup=20, schedule={path: {"power": 2}})
    assert rates(config)[20:] == [0.5 * (1 - step / 80) ** 2 for step in range(80)]
    assert rates(OptimConfig(lr=0.5, schedule=path))[50] == 0.25


def test_a_number_that_yaml_takes_for_a_word_reaches_the_function_as_a_number(own):
    path = own("def rate(step, *, steps, lr, least):\n    return max(lr, least)\n")
    assert rate_at(0, 0.0, OptimConfig(schedule={path: {"least": "1e-3"}}), RUN) == 1e-3


@pytest.mark.parametrize(
    "body",
    [
        *("return -1e-9", "return float('nan')", "return float('inf')", "return None", "return '0.1'"),
        *("return True", "return 1j", "return [0.1]", "return 10 ** 400", "return lr / 0"),
        *("raise KeyError('x')", "return unknown", "return 0.1 if step < 99 else -1"),
    ],
)
def test_a_function_that_gives_no_rate_is_refused_before_the_first_step(body, own):
    path = own(f"def rate(step, *, steps, lr):\n    {body}\n")
    assert path in refusal(OptimConfig(schedule=path))


@pytest.mark.parametrize("text", ["rate = 3\n", "def rate(step):\n    return 0.1\n"])
def test_what_cannot_be_called_as_a_schedule_is_refused(text, own):
    path = own(text)
    assert path in refusal(OptimConfig(schedule=path))


def test_arguments_that_the_function_does_not_take_are_refused(own):
    path = own("def rate(step, *, steps, lr):\n    return lr\n")
    assert "pwoer" in refusal(OptimConfig(schedule={path: {"pwoer": 2}}))


# Plateaus.

SCORES = st.lists(st.one_of(st.floats(-2, 2), st.sampled_from([0.5, 0.5, 0.6, 1.0])), max_size=40)


@settings(deadline=None)
@given(
    SCORES,
    st.booleans(),
    st.builds(
        Plateau,
        factor=st.floats(0.1, 0.9),
        patience=st.integers(0, 4),
        threshold=st.floats(0, 0.5),
        threshold_mode=st.sampled_from(["rel", "abs"]),
        cooldown=st.integers(0, 4),
        min_lr=st.floats(0, 0.5),
    ),
    st.floats(0.01, 1),
)
def test_plateau_is_torchs(scores, lower, spec, peak):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    mode = "min" if lower else "max"
    scheduler = torchs.ReduceLROnPlateau(optimizer, mode, eps=0, **spec.model_dump())
    config = OptimConfig(lr=peak, schedule={"plateau": spec.model_dump()})
    state = PlateauState()
    for score in scores:
        scheduler.step(score)
        state = after_evaluation(state, score, spec=spec, lower_is_better=lower)
        assert (state.bad, state.cooldown) == (scheduler.num_bad_epochs, scheduler.cooldown_counter)
        found = rate_at(7, peak, config, RUN, drops=state.factor)
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


@pytest.mark.parametrize("nothing", [None, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("lower", [True, False])
def test_a_score_that_is_not_defined_is_no_progress(nothing, lower):
    spec = Plateau(patience=1, factor=0.5)
    state = PlateauState()
    for factor in (1.0, 0.5, 0.5, 0.25):
        state = after_evaluation(state, nothing, spec=spec, lower_is_better=lower)
        assert (state.best, state.factor) == (None, factor)
    state = after_evaluation(state, 0.7, spec=spec, lower_is_better=lower)
    assert (state.best, state.bad) == (0.7, 0)


def test_the_state_of_a_plateau_survives_json():
    spec, state = Plateau(patience=1), PlateauState()
    for score in (0.5, 0.4, 0.4, 0.6, 0.5):
        state = after_evaluation(state, score, spec=spec, lower_is_better=False)
        assert PlateauState(**json.loads(json.dumps(asdict(state)))) == state


def test_a_rate_that_has_dropped_while_warming_up_stays_dropped():
    config = OptimConfig(lr=1.0, warmup=10, schedule="plateau")
    assert rate_at(4, 1.0, config, RUN, drops=0.1) == pytest.approx(0.05)
    assert rate_at(10, 1.0, config, RUN, drops=0.1) == pytest.approx(0.1)
