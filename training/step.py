"""One optimizer step: the gradient of a global batch, clipped, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.batch import Batch
from training.clipping import clip_gradients
from training.gradients import accumulate
from training.job import Job
from training.step_report import Taken


def take_step(
    job: Job, batches: Iterator[Batch], step: int, *, stop: bool = False, save: bool = False
) -> Taken:
    """Optimizer step `step` (from 0); every process comes here.

    `stop`, `save`: what this process was asked for, or its clock says; all hear of it with the step's sums.
    """
    job.set_rates(step)
    share = accumulate(job, batches, step)
    job.watch.switch("optimizer")
    parameters = list(job.network.parameters())
    clip_gradients(job.accelerator, parameters, job.config.optim, head=job.head_parameters)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    if job.average is not None:
        job.average.update(job.network, step=step)
    job.watch.switch("other")
    share.stop, share.save = stop, save
    return Taken.told_to_all(share, step=step, seconds=job.watch.lap())
