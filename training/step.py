"""One optimizer step: the gradient of a global batch, clipped, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.batch import Batch
from training.clipping import clip_gradients
from training.gradients import accumulate
from training.job import Job
from training.nonfinite import leave_out, statistics_before
from training.step_report import Taken


def take_step(
    job: Job, batches: Iterator[Batch], step: int, *, stop: bool = False, save: bool = False
) -> Taken:
    """Optimizer step `step` (from 0); every process comes here.

    `stop`, `save`: what this process was asked for, or its clock says; all hear of it with the step's sums.
    NONFINITE where the gradient is not finite and the run cannot go on.
    """
    job.set_rates(step)
    before = statistics_before(job)
    share = accumulate(job, batches, step)
    job.watch.switch("optimizer")
    # Accelerate's wrapper is there for the scaler. Twice a step it looks on the disk for a package that it
    # could work with, and it reads a signature: 0.1 ms.
    wrapped, rule, skipped = job.optimizer, getattr(job.optimizer, "optimizer", job.optimizer), ""
    if clip_gradients(job.accelerator, job.parameters, job.config.optim, head=job.head_parameters):
        (rule if job.accelerator.scaler is None else wrapped).step()
        if job.average is not None:
            job.average.update(job.network, step=step)
    else:
        skipped = leave_out(job, step, before)
    rule.zero_grad(set_to_none=True)
    job.watch.switch("other")
    share.stop, share.save = stop, save
    return Taken.told_to_all(share, step=step, lap=job.watch.lap(), skipped=skipped)
