"""The courses of the learning rate that a recipe may name; training.schedules is what they compute.

Arguments have the names that torch.optim.lr_scheduler gives them; a bare number is optimizer steps.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_serializer, model_validator

from training.config.durations import Duration
from training.config.tree import Fraction, Own, Rate, Section, Spec

Factor = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Divisor = Annotated[float, Field(ge=1, allow_inf_nan=False)]


class Constant(Section):
    """The rate as it is."""


class Linear(Section):
    """A straight line between two shares of the rate."""

    start_factor: Fraction = 1.0
    """share of the rate at the start"""
    end_factor: Fraction = 0.0
    """share of the rate at the end"""
    total_iters: Duration | None = None
    """length; default: to the end of the run"""


class Step(Section):
    """A drop at even distances."""

    step_size: Duration
    """between two drops"""
    gamma: Factor = 0.1
    """factor of each drop"""


class MultiStep(Section):
    """A drop at each milestone."""

    milestones: tuple[Duration, ...] = Field(min_length=1)
    """after the warm-up"""
    gamma: Factor = 0.1
    """factor of each drop"""


class Exponential(Section):
    """A drop after every period."""

    gamma: Factor
    """factor of each drop"""
    every: Duration = "1ep"
    """the period"""


class Cosine(Section):
    """Half a cosine. Source: Loshchilov and Hutter, SGDR (ICLR 2017)."""

    T_max: Duration | None = None
    """length; default: to the end of the run"""
    eta_min: Rate = 0.0
    """rate at the end"""


class CosineRestarts(Section):
    """Half a cosine again and again. Source: Loshchilov and Hutter, SGDR (ICLR 2017)."""

    T_0: Duration
    """length of the first"""
    T_mult: PositiveInt = 1
    """each is this many times as long as the one before"""
    eta_min: Rate = 0.0
    """rate at the end of each"""


class Polynomial(Section):
    """A power of what is left."""

    total_iters: Duration | None = None
    """length; default: to the end of the run"""
    power: Annotated[float, Field(gt=0, le=20, allow_inf_nan=False)] = 1.0
    """1: a straight line"""


class OneCycle(Section):
    """Up to the rate, then far below its start. Source: Smith and Topin (2018)."""

    pct_start: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """share of the run that rises"""
    anneal_strategy: Literal["cos", "linear"] = "cos"
    """shape of both legs"""
    div_factor: Divisor = 25.0
    """the rate by this is the rate at the start"""
    final_div_factor: Divisor = 1e4
    """the rate at the start by this is that at the end"""
    three_phase: bool = False
    """down to the start as steeply as up, then to the end"""


class Plateau(Section):
    """A drop where evaluations show no progress; it looks at the score that chooses the best weights."""

    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """factor of each drop"""
    patience: NonNegativeInt = 10
    """evaluations without progress that are borne"""
    threshold: Rate = 1e-4
    """progress that counts as such"""
    threshold_mode: Literal["rel", "abs"] = "rel"
    """progress as a share of the best, or as it is"""
    cooldown: NonNegativeInt = 0
    """evaluations after a drop that are not counted"""
    min_lr: Rate = 0.0
    """the rate does not fall below"""


class OwnSchedule(Own):
    """A function of the user's: `rate(step, *, steps, lr, **arguments)`, step from 0 after the warm-up."""


class Schedule(Spec):
    """One course of the rate: `cosine`, `{step: {step_size: 7ep}}` or `{"mymodule:rate": {…}}`."""

    constant: Constant | None = None
    linear: Linear | None = None
    step: Step | None = None
    multi_step: MultiStep | None = None
    exponential: Exponential | None = None
    cosine: Cosine | None = None
    cosine_restarts: CosineRestarts | None = None
    polynomial: Polynomial | None = None
    one_cycle: OneCycle | None = None
    plateau: Plateau | None = None
    own: dict[str, OwnSchedule] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one(self) -> Schedule:
        named = [*(name for name in self.model_fields_set if name != "own"), *self.own]
        if len(named) != 1:
            raise ValueError(f"one course of the rate, here are {len(named)}: {', '.join(sorted(named))}")
        return self

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        name, spec = self.call
        return {name: spec.model_dump()}

    @property
    def call(self) -> tuple[str, Section]:
        """Name (or import path) and arguments."""
        if self.own:
            return next(iter(self.own.items()))
        (name,) = (name for name in self.model_fields_set if name != "own")
        spec: Section = getattr(self, name)
        return name, spec
