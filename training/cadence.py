"""When a run evaluates and when it saves, by optimizer steps, epochs and minutes."""

from __future__ import annotations

import time

from training.job import Job
from training.schedules import steps_of


class SaveClock:
    """Whether `checkpoint.every_minutes` have passed since this process saw the last save."""

    def __init__(self, minutes: float | None) -> None:
        self._seconds = None if minutes is None else 60 * minutes
        self._since = time.monotonic()

    @property
    def due(self) -> bool:
        """It is time to save."""
        return self._seconds is not None and time.monotonic() - self._since >= self._seconds

    def saved(self) -> None:
        """Count anew."""
        self._since = time.monotonic()


def evaluates_after(job: Job, step: int) -> bool:
    """Whether an evaluation belongs behind optimizer step `step` (from 0)."""
    every = job.config.eval.every_epochs * job.plan.steps_per_epoch
    return (step + 1) % every == 0 or step + 1 == job.last_step


def saves_after(job: Job, step: int) -> bool:
    """Whether a checkpoint belongs behind optimizer step `step` (from 0), whatever the clock says."""
    config = job.config.checkpoint
    every = (
        config.every_steps,
        (config.every_epochs or 0) * job.plan.steps_per_epoch,
        kept_every(job),
        job.weights_every_steps,
    )
    return evaluates_after(job, step) or any(one and (step + 1) % one == 0 for one in every)


def kept_every(job: Job) -> int | None:
    """Optimizer steps between checkpoints that are kept for good; None: there are none."""
    every = job.config.checkpoint.keep_every
    return None if every is None else max(1, steps_of(every, job.length))


def evaluation_is_owed(job: Job) -> bool:
    """Whether the run was stopped between a step and the evaluation that belongs behind it."""
    done = job.progress.step
    return done > 0 and evaluates_after(job, done - 1) and job.progress.evaluated != done
