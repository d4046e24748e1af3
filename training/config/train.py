"""How a run trains, ends and saves, as a recipe says it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from training.config.durations import Duration
from training.config.tree import Rate, Section, free


class EarlyStop(Section):
    """When a run has learned what it can."""

    patience: PositiveInt
    """evaluations in a row without progress that end the run"""
    metric: str | None = None
    """score to look at; default: the one that chooses the best weights"""
    threshold: Rate = 0.0
    """progress that counts as such, in the score's own unit"""

    @model_validator(mode="before")
    @classmethod
    def _patience_alone(cls, written: Any) -> Any:
        return {"patience": written} if isinstance(written, int | str) else written


class TrainConfig(Section):
    """How long and in what portions."""

    global_batch: PositiveInt = 64
    """samples of one optimizer step, *all processes together*"""
    micro_batch: PositiveInt | None = free(None)
    """samples of one forward pass, *per process*, at most; default: the process's whole share"""
    epochs: PositiveInt | None = 5
    """passes over the training split; they fix the length of the schedule"""
    max_steps: PositiveInt | None = None
    """stop after this many optimizer steps; fixes the length of the schedule only where `epochs` is none"""
    max_minutes: float | None = free(None, gt=0, le=10**6)
    """minutes after which this start saves and stops (exit code 75); start it again to go on"""
    early_stop: EarlyStop | None = free(None)
    """end where evaluations show no progress: {patience: 5, metric: accuracy, threshold: 0.001}"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of the forward and backward pass; weights and losses stay fp32"""
    tf32: bool = False
    """let GPUs round the factors of fp32 products to 10 bits: faster, no longer fp32"""
    on_nonfinite: Literal["stop", "skip"] = free("stop")
    """a loss or gradient that is not finite ends the run (exit code 76), or its step is left out"""
    exact: bool = False
    """the same bits on 1, 2, 4, 8 ... processes: the batch is computed and added up grain by grain"""
    grain: PositiveInt | None = None
    """samples of a grain in exact mode, also BatchNorm's; default: a share of up to 8 processes"""
    sync_batchnorm: bool = False
    """BatchNorm over what all processes compute at a time: the whole batch, unless `micro_batch` cuts it"""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """decay of the running average of the weights, which is then evaluated and taken away; 0: off"""
    timeout_seconds: float = free(600.0, gt=0, le=7 * 86400)
    """processes that wait longer than this for one another fail; never less than `hang_minutes`"""
    hang_minutes: float = free(10.0, gt=0, le=10**6)
    """without progress for this long, every process's stacks are written down, and the run fails (71)"""


class CheckpointConfig(Section):
    """When the training state is saved; also after every evaluation and at the end."""

    every_steps: PositiveInt | None = free(None)
    """optimizer steps between checkpoints"""
    every_epochs: PositiveInt | None = free(None)
    """passes over the training split between checkpoints"""
    every_minutes: float | None = free(None, gt=0, le=10**6)
    """minutes between checkpoints; of several of these, each saves"""
    keep: PositiveInt = free(2)
    """newest checkpoints kept, beside the best"""
    keep_every: Duration | None = free(None)
    """length between checkpoints that are kept for good, such as 10ep; each of these is saved"""
    max_failures: PositiveInt = free(3)
    """failed saves in a row that end the run (exit code 74); before that it goes on, and says so"""
    weights_every_epochs: PositiveInt | None = free(None)
    """passes between files weights/epoch-0020.safetensors, which are kept; default: only last and best"""
