"""The learning rate as a pure function of the step: warm-up, then one of the courses that torch has."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple

from data_pipeline.fault import UserError, first_line
from training.config.durations import in_steps
from training.config.optim import OptimConfig
from training.config.schedule import (
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    Linear,
    MultiStep,
    OneCycle,
    OwnSchedule,
    Plateau,
    Polynomial,
    Step,
)
from training.plugins import load_plugin


class RunLength(NamedTuple):
    """What durations are measured by."""

    steps: int  # optimizer steps of the run
    steps_per_epoch: int
    global_batch: int


@lru_cache(maxsize=256)
def steps_of(duration: str, run: RunLength) -> int:
    """Optimizer steps of a duration; remembered, because every parameter group asks at every step."""
    return in_steps(duration, **run._asdict())


class Course(NamedTuple):
    """A point of the run behind its warm-up."""

    step: int  # optimizer steps since the warm-up
    steps: int  # optimizer steps from the warm-up to the end of the run, at least 1
    peak: float  # the highest rate
    run: RunLength
    drops: float  # what evaluations without progress have made of the rate

    def length(self, duration: str | None, name: str) -> int:
        """A duration in optimizer steps; None lasts to the end of the run. CONFIG where it is no step."""
        if duration is None:
            return self.steps
        steps = steps_of(duration, self.run)
        if steps < 1:
            raise UserError(
                f"optim.schedule: {name} {duration} is less than an optimizer step of this run, which has "
                f"{self.run.steps}, {self.run.steps_per_epoch} an epoch",
                mend="make it longer",
                code="CONFIG",
            )
        return steps


@dataclass(frozen=True)
class PlateauState:
    """How a rate that drops where there is no progress stands after the evaluations so far."""

    best: float | None = None
    bad: int = 0  # evaluations without progress in a row
    cooldown: int = 0  # evaluations that are still not counted
    factor: float = 1.0  # product of the drops


def rate_at(step: int, peak: float, config: OptimConfig, run: RunLength, *, drops: float = 1.0) -> float:
    """Learning rate of optimizer step `step` (from 0) for parameters whose highest rate is `peak`.

    Rises linearly over the warm-up and reaches `peak` with its last step; then `config.schedule`. `drops` is
    PlateauState.factor. Raises CONFIG where the schedule does not fit the run.
    """
    warmup = steps_of(config.warmup, run)
    name, spec = config.schedule.call
    if warmup and isinstance(spec, OneCycle):
        raise UserError(
            f"optim.warmup: {config.warmup} in front of one_cycle, which has a rise of its own",
            mend="set --optim.warmup 0, and one_cycle's pct_start to the share of the run that rises",
            code="CONFIG",
        )
    if step < warmup:
        return peak * (step + 1) / warmup * drops
    course = Course(step - warmup, max(1, run.steps - warmup), peak, run, drops)
    return own(name, spec, course) if isinstance(spec, OwnSchedule) else SCHEDULES[name](spec, course)


def check_schedule(config: OptimConfig, run: RunLength) -> None:
    """CONFIG where the schedule does not fit the run; to be called before the first step."""
    for step in (0, steps_of(config.warmup, run), max(0, run.steps - 1)):
        rate_at(step, config.lr, config, run)


def constant(spec: Constant, at: Course) -> float:
    """The rate as it is."""
    return at.peak


def linear(spec: Linear, at: Course) -> float:
    """A straight line, then level; equal to LinearLR."""
    done = min(1.0, at.step / at.length(spec.total_iters, "total_iters"))
    return at.peak * (spec.start_factor + (spec.end_factor - spec.start_factor) * done)


def step(spec: Step, at: Course) -> float:
    """Drops at even distances; equal to StepLR."""
    return at.peak * float(spec.gamma ** (at.step // at.length(spec.step_size, "step_size")))


def multi_step(spec: MultiStep, at: Course) -> float:
    """A drop at each milestone, two where two fall together; equal to MultiStepLR."""
    passed = [one for one in spec.milestones if steps_of(one, at.run) <= at.step]
    return at.peak * float(spec.gamma ** len(passed))


def exponential(spec: Exponential, at: Course) -> float:
    """A drop after every period; equal to ExponentialLR stepped once a period."""
    return at.peak * float(spec.gamma ** (at.step // at.length(spec.every, "every")))


def cosine(spec: Cosine, at: Course) -> float:
    """Half a cosine, then level; up to T_max equal to CosineAnnealingLR, which rises again behind it."""
    done = min(1.0, at.step / at.length(spec.T_max, "T_max"))
    return spec.eta_min + (at.peak - spec.eta_min) * (1 + math.cos(math.pi * done)) / 2


def cosine_restarts(spec: CosineRestarts, at: Course) -> float:
    """Half a cosine again and again; equal to CosineAnnealingWarmRestarts."""
    length, inside = at.length(spec.T_0, "T_0"), at.step
    while spec.T_mult > 1 and inside >= length:
        inside, length = inside - length, length * spec.T_mult
    done = inside % length / length
    return spec.eta_min + (at.peak - spec.eta_min) * (1 + math.cos(math.pi * done)) / 2


def polynomial(spec: Polynomial, at: Course) -> float:
    """A power of what is left; equal to PolynomialLR."""
    left = 1 - min(1.0, at.step / at.length(spec.total_iters, "total_iters"))
    return at.peak * float(left**spec.power)


def one_cycle(spec: OneCycle, at: Course) -> float:
    """Up, then down below the start; equal to OneCycleLR over the whole run, but momentum stays."""
    if spec.three_phase and spec.pct_start > 0.5:
        raise UserError(
            f"optim.schedule: one_cycle in three phases: {spec.pct_start:g} of the run up, as much down",
            mend="set its pct_start to 0.5 at most",
            code="CONFIG",
        )
    start = at.peak / spec.div_factor
    floor = start / spec.final_div_factor
    top = spec.pct_start * at.steps - 1
    legs = [(top, start, at.peak)]
    if spec.three_phase:
        legs += [(2 * spec.pct_start * at.steps - 2, at.peak, start), (at.steps - 1, start, floor)]
    else:
        legs += [(at.steps - 1, at.peak, floor)]
    begin = 0.0
    while len(legs) > 1 and at.step > legs[0][0]:
        begin = legs.pop(0)[0]
    end, first, last = legs[0]
    done = min(1.0, (at.step - begin) / (end - begin)) if end > begin else 1.0
    if spec.anneal_strategy == "linear":
        return first + (last - first) * done
    return last + (first - last) / 2 * (1 + math.cos(math.pi * done))


def plateau(spec: Plateau, at: Course) -> float:
    """The rate after the drops so far; equal to ReduceLROnPlateau."""
    return max(at.peak * at.drops, min(spec.min_lr, at.peak))


def own(path: str, spec: OwnSchedule, at: Course) -> float:
    """What a function of the user's gives; CONFIG where that is no rate."""
    rate = load_plugin(path, option="--optim.schedule")
    try:
        found = rate(at.step, steps=at.steps, lr=at.peak, **spec.arguments)
        if isinstance(found, bool) or not isinstance(found, Real) or not 0 <= float(found) < math.inf:
            raise ValueError(f"gives {found!r}, which is no finite number from 0 up")
    except Exception as error:
        raise UserError(
            f"optim.schedule: {path} at step {at.step}: {type(error).__name__}: {first_line(error)}",
            mend="it is called as rate(step, steps=..., lr=..., and its own arguments) and gives the rate",
            code="CONFIG",
        ) from error
    return float(found)


SCHEDULES: dict[str, Callable[[Any, Course], float]] = {
    "constant": constant,
    "linear": linear,
    "step": step,
    "multi_step": multi_step,
    "exponential": exponential,
    "cosine": cosine,
    "cosine_restarts": cosine_restarts,
    "polynomial": polynomial,
    "one_cycle": one_cycle,
    "plateau": plateau,
}


def after_evaluation(
    state: PlateauState, value: float | None, *, spec: Plateau, lower_is_better: bool
) -> PlateauState:
    """The state after one more evaluation; a score that is not defined (None, nan) is no progress.

    Equal to ReduceLROnPlateau.step, but for its `eps`: no drop is too small.
    """
    better = value is not None and _is_progress(value, state.best, spec, lower_is_better)
    bad = 0 if better or state.cooldown else state.bad + 1
    best, cooldown = value if better else state.best, max(0, state.cooldown - 1)
    if bad <= spec.patience:
        return PlateauState(best, bad, cooldown, state.factor)
    return PlateauState(best, 0, spec.cooldown, state.factor * spec.factor)


def _is_progress(value: float, best: float | None, spec: Plateau, lower_is_better: bool) -> bool:
    if best is None or not math.isfinite(value):
        return math.isfinite(value)
    least = -spec.threshold if lower_is_better else spec.threshold
    limit = best * (1 + least) if spec.threshold_mode == "rel" else best + least
    return value < limit if lower_is_better else value > limit
