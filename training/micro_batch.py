"""One micro-batch on its way through the network: fetched, moved, counted; and what seeds its dropout."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from data_pipeline.batch import Batch
from data_pipeline.draws import hash64
from training.counts import batch_digest
from training.inputs import Inputs, Normalizer, forward
from training.job import Job
from training.step_report import Share


def empty_share(job: Job, *, rows: int) -> Share:
    """Nothing yet of a step's `rows` grains (1 outside exact mode)."""
    size, device = job.task.objective.size, job.accelerator.device
    return Share(torch.zeros((rows, size), dtype=torch.float64, device=device))


def next_batch(job: Job, batches: Iterator[Batch], step: int, share: Share) -> Batch:
    """The next micro-batch, which must be one of optimizer step `step`."""
    job.watch.switch("data")
    batch = next(batches)
    job.watch.switch("copy")
    assert batch.work.step == step, (batch.work.step, step)
    job.place.at(step=step, samples=batch.keys)
    share.bad += batch.bad
    return batch


def sums_of(job: Job, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    """The objective's sums over a micro-batch, float32 [S], with a gradient."""
    job.watch.switch("compute")
    with job.accelerator.autocast():
        outputs = forward(model, inputs.images)
    return job.task.objective.sums(outputs, inputs)


def seed_dropout(job: Job, step: int, part: str) -> None:
    """Dropout draws from a generator that is set anew for every step, so there is no state of it to save."""
    torch.manual_seed(hash64(f"dropout {job.config.seed} {step} {part}".encode()))


def add_digest(
    job: Job, batch: Batch, inputs: Inputs, share: Share, normalize: Normalizer | None = None
) -> None:
    """Add the batch's digest, if it is asked for; `normalize` where the inputs are not normalised yet."""
    kind = job.config.debug.batch_digest
    if kind != "none":
        seen = normalize.normalised(inputs) if normalize else inputs
        share.digest += batch_digest(batch, seen, pixels=kind == "pixels")
