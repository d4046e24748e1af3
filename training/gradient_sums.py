"""Lets DDP add up the gradients of the processes, which it would average by itself.

A process's gradient is its part of the global batch's, so their sum is what is asked for: dividing by the
number of processes, and multiplying before, would round for nothing, and overflow sooner in half precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from training.stopwatch import Stopwatch


def add_up_gradients(model: torch.nn.Module, watch: Stopwatch) -> None:
    """Once after DDP has wrapped a network; one that is not wrapped is left alone.

    What is left of a backward pass when the last gradients are ready is waiting for the others' parts.
    """
    if isinstance(model, DistributedDataParallel):
        # DDP compares a hook's annotations with types, and here they are text; a lambda has none.
        model.register_comm_hook(None, lambda _, bucket: _add_up(watch, bucket))


def _add_up(watch: Stopwatch, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    if bucket.is_last():
        watch.switch("reduce")
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    sums: torch.futures.Future[torch.Tensor] = work.get_future().then(lambda done: done.value()[0])
    return sums
