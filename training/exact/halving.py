"""A sum over processes that adds in one order, whatever carries the bytes.

Recursive halving, then doubling: neighbours swap halves and each adds up one; then pairs of two do, pairs of
four, and so on; then everything travels back. Each process sends and receives as many bytes as in a ring
all-reduce, whose order of addition is another for each number of processes. Source: Thakur, Rabenseifner and
Gropp, "Optimization of Collective Communication Operations in MPICH" (2005).
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def add_up(whole: torch.Tensor, room: torch.Tensor) -> None:
    """Make `whole` [N] the sum over all W processes, each of which comes here with the same N.

    W is a power of two that divides N; `room` [N / 2] is overwritten. The order: ((0 + 1) + (2 + 3)) + ....
    """
    rank, processes = dist.get_rank(), dist.get_world_size()
    assert processes & (processes - 1) == 0, processes
    assert len(whole) % processes == 0, (len(whole), processes)
    swapped = []
    stride, own = 1, whole
    while stride < processes:
        low, high = own.tensor_split(2)
        own, other = (high, low) if rank & stride else (low, high)
        received = room[: len(own)]
        _swap(other, received, rank ^ stride)
        # Who is on the left does not matter to a sum of two.
        own.add_(received)
        swapped.append((own, other, rank ^ stride))
        stride *= 2
    for own, other, partner in reversed(swapped):
        _swap(own, other, partner)


def _swap(mine: torch.Tensor, theirs: torch.Tensor, partner: int) -> None:
    """Send one and receive the other at the same time."""
    both = [dist.P2POp(dist.isend, mine, partner), dist.P2POp(dist.irecv, theirs, partner)]
    for under_way in dist.batch_isend_irecv(both):
        under_way.wait()
