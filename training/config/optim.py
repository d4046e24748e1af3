"""How weights change, as a recipe says it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from training.config.durations import Duration
from training.config.schedule import Schedule
from training.config.tree import Fraction, Rate, Section

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ParameterGroup(Section):
    """Parameters with a rate or a decay of their own; the first group that matches a name takes it."""

    match: str = Field(min_length=1)
    """pattern of parameters' names (`layer4.*`), or `head`, or `body`: everything but the head"""
    lr: Rate | None = None
    """peak learning rate; default: that of the others"""
    weight_decay: Rate | None = None
    """default: that of the others"""


class OptimConfig(Section):
    """How weights change."""

    name: Literal["sgd", "adam", "adamw", "rmsprop", "nadam", "lamb", "lion", "muon"] = "adamw"
    """update rule"""
    lr: Rate = 1e-3
    """peak learning rate"""
    weight_decay: Rate = 0.05
    """decoupled (adamw, lamb, lion, muon) or added to the gradient (the others); never on biases and norms"""
    momentum: Fraction = 0.9
    """of sgd (Nesterov), rmsprop and muon; of the first moment elsewhere"""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """further arguments of the update rule by its library's names, such as {eps: 1e-6}"""
    schedule: Schedule = Schedule.model_validate("cosine")
    """course of the rate after the warm-up: a name, or {name: {argument: value}}; --help lists them"""
    warmup: Duration = "0st"
    """length over which the rate rises linearly from zero: 500 (optimizer steps), 1ep, 20000sp or 5%"""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """rate of each layer as a share of that of the layer above it"""
    groups: tuple[ParameterGroup, ...] = ()
    """parameters with a rate or decay of their own, such as [{match: head, lr: 0.01}]"""
    clip_norm: Positive | None = None
    """largest L2 norm of the whole gradient; default: not clipped"""
    clip_value: Positive | None = None
    """largest absolute value in the gradient; default: not clipped"""
    clip_adaptive: Positive | None = None
    """largest norm of a unit's gradient as a share of its weights' norm; default: not clipped"""

    @model_validator(mode="after")
    def _one_clipping(self) -> OptimConfig:
        asked = [f"clip_{how}" for how in ("norm", "value", "adaptive") if getattr(self, f"clip_{how}")]
        if len(asked) > 1:
            raise ValueError(f"one kind of clipping at a time, here are {' and '.join(asked)}")
        return self
