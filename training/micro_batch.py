"""One micro-batch on its way through the network: fetched, moved, counted; and what seeds its dropout."""

from __future__ import annotations

import contextlib
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
    return Share.empty(rows, job.task.objective.size, job.accelerator.device)


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
    job.presence.valid = inputs.valid
    # Accelerate's context costs 40 us also where it does nothing.
    with job.accelerator.autocast() if job.accelerator.native_amp else contextlib.nullcontext():
        outputs = forward(model, inputs.images)
    sums = job.task.objective.sums(outputs, inputs)
    # A loss that is infinite may have a finite gradient. This makes it NaN, so that all processes know of it
    # before the optimizer's step; else it is a factor of 1.
    known = 1 + (sums - sums).detach()
    return sums * known


def take_gradient(job: Job, sums: torch.Tensor, slopes: torch.Tensor) -> None:
    """Add the gradient of slopes @ sums to the parameters', scaled where half precision asks for it."""
    scaler, slopes = job.accelerator.scaler, slopes.to(sums.dtype)
    # The same numbers as by way of a loss and accelerator.backward, without their operations there and back.
    torch.autograd.backward(sums, slopes if scaler is None else scaler.scale(slopes))


def seed_dropout(job: Job, step: int, part: str) -> None:
    """Dropout draws from a generator that is set anew for every step, so there is no state of it to save."""
    seed = hash64(f"dropout {job.config.seed} {step} {part}".encode())
    # torch.manual_seed also notes a stack trace for each kind of device that is not there: 0.5 ms.
    torch.default_generator.manual_seed(seed)
    if job.accelerator.device.type == "cuda":
        torch.cuda.manual_seed(seed)


def add_digest(
    job: Job, batch: Batch, inputs: Inputs, share: Share, normalize: Normalizer | None = None
) -> None:
    """Add the batch's digest, if it is asked for; `normalize` where the inputs are not normalised yet."""
    kind = job.config.debug.batch_digest
    if kind != "none":
        seen = normalize.normalised(inputs) if normalize else inputs
        share.digest += batch_digest(batch, seen, pixels=kind == "pixels")
