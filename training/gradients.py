"""The gradient of a global batch, however it is cut: the one that a single process would get from it whole.

The loss is a function of sums over the global batch (training.objective), so its gradient is that of
slopes @ sums, and the slopes are known once the global sums are. Three cases, by what they depend on:
nothing (one class per picture: the count is the batch), the targets (missing labels, ignored pixels, weights:
the counts travel while the network computes), or the outputs (overlapping areas: sums are added up before the
backward pass; with several micro-batches, the forward pass is computed twice, first without a gradient).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from data_pipeline.batch import Batch
from training.buffer_copies import BufferCopies
from training.counts import SharedSums
from training.exact.grains import accumulate_grains
from training.inputs import Inputs, Normalizer
from training.job import Job
from training.micro_batch import add_digest, empty_share, next_batch, seed_dropout, sums_of, take_gradient
from training.step_report import Share


def accumulate(job: Job, batches: Iterator[Batch], step: int) -> Share:
    """Leave the gradient of global batch `step` in the parameters; every process comes here."""
    if job.config.train.exact:
        return accumulate_grains(job, batches, step)
    seed_dropout(job, step, str(job.accelerator.process_index))
    normalize, share = job.normalizer, empty_share(job, rows=1)
    first = next_batch(job, batches, step, share)
    if job.task.objective.needs == "nothing":
        _take_as_they_come(job, normalize, batches, first, share)
    elif first.last:
        _take_alone(job, normalize, first, share)
    else:
        _take_together(job, normalize, batches, first, share)
    return share


def _take_as_they_come(
    job: Job, normalize: Normalizer, batches: Iterator[Batch], first: Batch, share: Share
) -> None:
    batch, slopes = first, job.known_slopes
    while True:
        inputs = normalize(batch)
        add_digest(job, batch, inputs, share)
        with _reduced_at_the_end(job, last=batch.last):
            take_gradient(job, _sums(job, job.model, inputs, share), slopes)
        if batch.last:
            return
        batch = next_batch(job, batches, batch.work.step, share)


def _take_alone(job: Job, normalize: Normalizer, batch: Batch, share: Share) -> None:
    """The whole share is one micro-batch: nothing is computed twice."""
    objective, inputs = job.task.objective, normalize(batch)
    add_digest(job, batch, inputs, share)
    under_way = SharedSums(objective.counts(inputs)) if objective.needs == "targets" else None
    sums = _sums(job, job.model, inputs, share)
    known = under_way or SharedSums(sums.detach().double())
    take_gradient(job, sums, _slopes(job, known))


def _take_together(
    job: Job, normalize: Normalizer, batches: Iterator[Batch], first: Batch, share: Share
) -> None:
    """Several micro-batches: all are there before the first backward pass."""
    objective = job.task.objective
    held = [normalize.kept(first)]
    add_digest(job, first, held[0], share, normalize)
    batch = first
    while not batch.last:
        batch = next_batch(job, batches, first.work.step, share)
        held.append(normalize.kept(batch))
        add_digest(job, batch, held[-1], share, normalize)
    if objective.needs == "targets":
        known = torch.stack([objective.counts(inputs) for inputs in held]).sum(dim=0)
    else:
        known = _previewed(job, normalize, held)
        seed_dropout(job, first.work.step, str(job.accelerator.process_index))
    slopes = _slopes(job, SharedSums(known))
    for number, inputs in enumerate(held, 1):
        with _reduced_at_the_end(job, last=number == len(held)):
            take_gradient(job, _sums(job, job.model, normalize.normalised(inputs), share), slopes)


def _previewed(job: Job, normalize: Normalizer, held: list[Inputs]) -> torch.Tensor:
    """The objective's sums over this process's share; the network is left as it was."""
    buffers = BufferCopies(job.network)
    unused = empty_share(job, rows=1)
    with torch.no_grad():
        for inputs in held:
            _sums(job, job.network, normalize.normalised(inputs), unused)
    buffers.put_back()
    return unused.sums[0]


def _slopes(job: Job, known: SharedSums) -> torch.Tensor:
    """Of the objective, from what all processes know of the global batch."""
    job.watch.switch("reduce")
    sums = known.tensor()
    job.watch.switch("compute")
    return job.task.objective.slopes(sums)


def _sums(job: Job, model: torch.nn.Module, inputs: Inputs, share: Share) -> torch.Tensor:
    sums = sums_of(job, model, inputs)
    share.sums[0].add_(sums.detach())
    return sums


def _reduced_at_the_end(job: Job, *, last: bool) -> contextlib.AbstractContextManager[object]:
    """DDP reduces gradients once a step: in the backward pass of the last micro-batch."""
    return contextlib.nullcontext() if last else job.accelerator.no_sync(job.model)
