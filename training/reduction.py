"""Before the first step: fixes the order in which DDP adds gradients, and finds what it would wait for.

Fixed, because then a run that is resumed repeats the bits of one that never stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.nn.parallel import DistributedDataParallel

from data_pipeline.batch import Batch
from data_pipeline.fault import UserError
from training.buffer_copies import BufferCopies
from training.job import Job
from training.micro_batch import sums_of


def settle_reduction(job: Job, batch: Batch) -> None:
    """Let DDP see one backward pass that counts for nothing; weights, gradients, buffers stay as they were.

    DDP lays its buckets out anew after the first backward pass it sees, by the order in which gradients
    arrived. With three or more processes an element's place in a bucket decides in which order its parts are
    added (ring all-reduce), so the first step after every start would add in another order than all others.
    Measured: without this, stop and resume on 3 processes gives other last bits; with it, the same file.

    CONFIG where the forward pass leaves parameters unused that are to learn: DDP waits for the gradient of
    each. A single process waits for nobody, so there they stay as they are, as torch has it.
    """
    accelerator, model = job.accelerator, job.model
    if not isinstance(model, DistributedDataParallel):
        return
    buffers = BufferCopies(job.network)
    sums = sums_of(job, model, job.normalizer(batch))
    accelerator.backward(sums.sum() * 0.0)
    job.watch.switch("other")
    _check_all_used(job.network, freeze=job.config.model.freeze)
    model.zero_grad(set_to_none=True)
    buffers.put_back()


def _check_all_used(network: torch.nn.Module, *, freeze: Sequence[str]) -> None:
    """CONFIG where a backward pass has left parameters without a gradient."""
    learning = {name: one for name, one in network.named_parameters() if one.requires_grad}
    unused = {name for name, parameter in learning.items() if parameter.grad is None}
    if not unused:
        return
    whole = _whole_modules(unused, learning)
    frozen = ", ".join([*freeze, *whole])
    raise UserError(
        f"model: the forward pass does not use {len(unused)} of the {len(learning)} parameters that are to "
        f"learn, and several processes would wait for their gradients: {', '.join(whole)}",
        mend=f"freeze them, which changes nothing that is learned: --model.freeze '[{frozen}]'",
        code="CONFIG",
    )


def _whole_modules(chosen: set[str], names: Iterable[str]) -> list[str]:
    """Names of parameters, shortened to those of modules whose parameters are all among them."""
    mixed = {prefix for name in names if name not in chosen for prefix in _prefixes(name)}
    largest = (next(one for one in _prefixes(name) if one not in mixed) for name in names if name in chosen)
    return list(dict.fromkeys(largest))


def _prefixes(name: str) -> list[str]:
    """`a`, `a.b` and `a.b.c` of `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
