"""The gradient of a global batch, grain by grain: the same bits whichever processes compute the grains.

Every grain has a forward and a backward pass of its own, seeded by its number; nothing that it computes
depends on who computes it, and everything is added up in one order (training.exact.sum_tree). What the
objective needs to know before the first backward pass is as in training.gradients, with a row for each grain.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from data_pipeline.batch import Batch
from training.counts import SharedSums
from training.exact.grain_sums import GrainSums
from training.exact.settling import settled
from training.inputs import Inputs
from training.job import Job
from training.micro_batch import add_digest, empty_share, next_batch, seed_dropout, sums_of, take_gradient
from training.step_report import Share, added


def accumulate_grains(job: Job, batches: Iterator[Batch], step: int) -> Share:
    """Leave the gradient of global batch `step` in the parameters; every process comes here.

    A parameter that no pass uses has none afterwards, on every process.
    """
    share = empty_share(job, rows=job.config.grains)
    first = next_batch(job, batches, step, share)
    assert first.work.pieces == len(own_grains(job)), first.work
    if job.grain_sums is None:
        job.grain_sums = settled(job, first)
    grain_sums = job.grain_sums
    grain_sums.begin()
    with grain_sums.own_statistics():
        if job.task.objective.needs == "nothing":
            arriving = _arriving(job, batches, first, share)
            _take_as_they_come(job, grain_sums, arriving, step, share)
        else:
            held = list(_arriving(job, batches, first, share, keep=True))
            _take_together(job, grain_sums, held, step, share)
    job.watch.switch("reduce")
    grain_sums.finish()
    return share


def own_grains(job: Job) -> range:
    """The numbers of this process's grains in the global batch."""
    own = job.config.grains // job.accelerator.num_processes
    first = own * job.accelerator.process_index
    return range(first, first + own)


def _arriving(
    job: Job, batches: Iterator[Batch], batch: Batch, share: Share, *, keep: bool = False
) -> Iterator[Inputs]:
    """The inputs of this process's grains; with `keep` they stay, not normalised yet."""
    normalize = job.normalizer
    while True:
        inputs = normalize.kept(batch) if keep else normalize(batch)
        add_digest(job, batch, inputs, share, normalize if keep else None)
        yield inputs
        if batch.last:
            return
        batch = next_batch(job, batches, batch.work.step, share)


def _take_as_they_come(
    job: Job, grain_sums: GrainSums, arriving: Iterator[Inputs], step: int, share: Share
) -> None:
    mine = own_grains(job)
    for grain, inputs in zip(mine, arriving, strict=True):
        sums = _sums(job, inputs, step, grain)
        share.sums[grain] = sums.detach()
        take_gradient(job, sums, job.known_slopes)
        grain_sums.take(grain - mine.start)


def _take_together(job: Job, grain_sums: GrainSums, held: list[Inputs], step: int, share: Share) -> None:
    """All grains are there before the first backward pass, whose scale depends on all of them."""
    objective, mine, normalize = job.task.objective, own_grains(job), job.normalizer
    # Rows of other processes are zero: adding those up rounds nothing, and then the order is ours.
    rows = torch.zeros_like(share.sums)
    for grain, inputs in zip(mine, held, strict=True):
        if objective.needs == "targets":
            rows[grain] = objective.counts(inputs)
        else:
            with torch.no_grad():
                rows[grain] = _sums(job, normalize.normalised(inputs), step, grain)
    under_way, slopes = SharedSums(rows), None
    for grain, inputs in zip(mine, held, strict=True):
        sums = _sums(job, normalize.normalised(inputs), step, grain)
        share.sums[grain] = sums.detach()
        if slopes is None:
            job.watch.switch("reduce")
            slopes = objective.slopes(added(under_way.tensor()))
            job.watch.switch("compute")
        take_gradient(job, sums, slopes)
        grain_sums.take(grain - mine.start)


def _sums(job: Job, inputs: Inputs, step: int, grain: int) -> torch.Tensor:
    seed_dropout(job, step, f"grain {grain}")
    return sums_of(job, job.model, inputs)
