"""Fixes the order in which DDP adds gradients before the first step, so that resuming repeats the bits."""

from __future__ import annotations

import torch

from data_pipeline.batch import Batch
from training.inputs import forward
from training.job import Job


def settle_reduction(job: Job, batch: Batch) -> None:
    """Let DDP see one backward pass that counts for nothing; weights, gradients, buffers stay as they were.

    DDP lays its buckets out anew after the first backward pass it sees, by the order in which gradients
    arrived. With three or more processes an element's place in a bucket decides in which order its parts are
    added (ring all-reduce), so the first step after every start would add in another order than all others.
    Measured: without this, stop and resume on 3 processes gives other last bits; with it, the same file.
    """
    accelerator, model = job.accelerator, job.model
    if accelerator.num_processes == 1:
        return
    inputs = job.normalizer(batch)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with accelerator.autocast():
        outputs = forward(model, inputs.images)
    accelerator.backward(job.task.objective.sums(outputs, inputs).sum() * 0.0)
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
