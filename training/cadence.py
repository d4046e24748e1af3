"""When a run evaluates and when it saves, by optimizer steps, epochs and minutes."""

from __future__ import annotations

import time
from typing import NamedTuple

from training.config import Config
from training.job import Job
from training.schedules import RunLength, steps_of


class Cadence(NamedTuple):
    """What happens behind which optimizer step (from 0); a pure function of it.

    `evaluates` and each of `saves` are numbers of optimizer steps, whose multiples are meant; the run ends
    after `last` steps.
    """

    evaluates: int
    saves: tuple[int, ...]
    last: int

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation belongs behind it: the last step has one, wherever it is."""
        return (step + 1) % self.evaluates == 0 or step + 1 == self.last

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint belongs behind it, whatever the clock says; every evaluation has one."""
        return self.evaluates_after(step) or any((step + 1) % every == 0 for every in self.saves)


def cadence_of(config: Config, length: RunLength, *, last: int) -> Cadence:
    """The cadence of a run that ends after `last` optimizer steps."""
    saving, epoch = config.checkpoint, length.steps_per_epoch
    epochs = (saving.every_epochs or 0, saving.weights_every_epochs or 0)
    steps = (saving.every_steps, *(epoch * each for each in epochs), kept_steps(config, length))
    return Cadence(config.eval.every_epochs * epoch, tuple(filter(None, steps)), last)


def kept_steps(config: Config, length: RunLength) -> int | None:
    """Optimizer steps between checkpoints that are kept for good; None: there are none."""
    every = config.checkpoint.keep_every
    return None if every is None else max(1, steps_of(every, length))


def job_cadence(job: Job) -> Cadence:
    """`cadence_of` a job."""
    return cadence_of(job.config, job.length, last=job.last_step)


def kept_every(job: Job) -> int | None:
    """`kept_steps` of a job."""
    return kept_steps(job.config, job.length)


def evaluation_is_owed(job: Job) -> bool:
    """Whether the run was stopped between a step and the end of the evaluation that belongs behind it."""
    done = job.progress.step
    return done > 0 and job_cadence(job).evaluates_after(done - 1) and job.progress.evaluated != done


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
