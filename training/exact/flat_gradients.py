"""The gradients of a process's grains, added up along the tree, and then over processes.

Shapes: N elements of all gradients, one parameter behind the other, with a little padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from data_pipeline.fault import UserError
from training.exact.halving import add_up
from training.exact.sum_tree import landings

ALIGNED = 16  # elements: a parameter begins where a cache line does, as in memory of its own


class FlatGradients:
    """Buffers for sums of gradients, allocated once.

    Beside the gradient that torch itself makes, that is one buffer [N] for each level of the process's own
    part of the tree, log2 of its grains, and for several processes half of one to receive.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], *, grains: int, processes: int) -> None:
        """`parameters`: those that every pass uses; `grains`: of this process."""
        self._names, self._parameters = list(parameters), list(parameters.values())
        self._landings = landings(grains)
        sizes = [-(-parameter.numel() // ALIGNED) * ALIGNED for parameter in self._parameters]
        length = -(-sum(sizes) // (processes * ALIGNED)) * processes * ALIGNED
        depth = 1 + max(landing.buffer for landing in self._landings)
        device = self._parameters[0].device
        # Zeros, not empty: the padding travels too, and no bit of it may be a signalling NaN.
        self._buffers = [torch.zeros(length, device=device) for _ in range(depth)]
        self._views = [_views(buffer, self._parameters, sizes) for buffer in self._buffers]
        self._room = torch.zeros(length // 2, device=device) if processes > 1 else None

    @torch.no_grad()
    def take(self, grain: int) -> None:
        """Take the gradients of this process's `grain` (from 0) off the parameters; CONFIG without one."""
        landing = self._landings[grain]
        gradients, into = [], self._views[landing.buffer]
        for name, parameter in zip(self._names, self._parameters, strict=True):
            if parameter.grad is None:
                raise used_in_some_passes(name)
            gradients.append(parameter.grad)
            # The next backward pass then leaves its own gradient, whole, instead of adding to this one piece
            # by piece: only so is a sum of two grains the same here as over processes.
            parameter.grad = None
        if landing.fresh:
            torch._foreach_copy_(into, gradients)
        else:
            torch._foreach_add_(into, gradients)
        for top in range(landing.buffer, landing.buffer - landing.merges, -1):
            self._buffers[top - 1].add_(self._buffers[top])

    @torch.no_grad()
    def give(self) -> None:
        """Leave the sum over all grains of all processes in the parameters; every process comes here."""
        whole = self._buffers[0]
        if self._room is not None:
            add_up(whole, self._room)
        for parameter, view in zip(self._parameters, self._views[0], strict=True):
            parameter.grad = view


def used_in_some_passes(name: str) -> UserError:
    """A network that leaves out layers by chance: what they keep would depend on who computes which grain."""
    return UserError(
        f"train.exact: the network uses the parameter {name!r} in some forward passes and not in others",
        mend="freeze what is left out: --model.freeze NAME, or set --train.exact false",
        code="CONFIG",
    )


def _views(
    buffer: torch.Tensor, parameters: Sequence[torch.nn.Parameter], sizes: Sequence[int]
) -> list[torch.Tensor]:
    """A piece of the buffer for each parameter, laid out in memory as the parameter is."""
    views, begin = [], 0
    for parameter, size in zip(parameters, sizes, strict=True):
        like = torch.empty_like(parameter, device="meta")
        views.append(buffer.as_strided(like.size(), like.stride(), begin))
        begin += size
    return views
