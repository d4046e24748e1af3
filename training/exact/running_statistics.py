"""Running statistics of normalisation that advance grain by grain, in the order of the grains.

In a grain's forward pass BatchNorm sees that grain alone, on any number of processes: "ghost batch norm",
Hoffer, Hubara and Soudry (NeurIPS 2017). Shapes: G grains of the global batch, S statistics of all layers,
means and variances one behind the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

# Its newer name; floors stay low.
GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def learning_norms(network: torch.nn.Module) -> dict[str, _NormBase]:
    """Layers by name that write running statistics while the network learns; not those that are frozen.

    Only layers whose arithmetic we know: what others keep is found as a buffer that changes.
    """
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, _NormBase)
        and module.training
        and module.running_mean is not None
        # Without a momentum BatchNorm counts; the others of its kind then leave their statistics alone.
        and (module.momentum is not None or isinstance(module, _BatchNorm))
    }


@contextlib.contextmanager
def own_statistics(norms: Iterable[_NormBase]) -> Iterator[None]:
    """Inside, the running statistics after a forward pass are those of that pass alone."""
    momenta = [(norm, norm.momentum) for norm in norms]
    for norm, _ in momenta:
        norm.momentum = 1.0
    try:
        yield
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum


def statistics_of(norms: Iterable[_NormBase]) -> list[torch.Tensor]:
    """Running mean and variance of each layer in turn."""
    found = [one for norm in norms for one in (norm.running_mean, norm.running_var)]
    return [one for one in found if one is not None]


class RunningStatistics:
    """What the forward passes of a step's grains leave in the layers, and what becomes of it.

    Where a network calls a layer several times in a pass, the statistics of the last call count.
    """

    def __init__(self, norms: Mapping[_NormBase, int], *, grains: int, processes: int) -> None:
        """`norms`: the layers, and how many passes each counts in a grain; `grains`: of the global batch."""
        self._norms, self._grains, self._processes = dict(norms), grains, processes
        self._buffers = statistics_of(norms)
        self._sizes = [buffer.numel() for buffer in self._buffers]
        device, length = self._buffers[0].device, sum(self._sizes)
        self._rows = torch.zeros((grains // processes, length), device=device)
        self._all = torch.zeros((grains, length), device=device) if processes > 1 else self._rows
        self._running = torch.zeros(length, device=device)
        self._row_views = [torch.split(row, self._sizes) for row in self._rows]
        self._running_views = torch.split(self._running, self._sizes)
        momenta = [torch.full((2 * norm.num_features,), norm.momentum or 0.0) for norm in norms]
        self._momentum = torch.cat(momenta).to(device)
        # Instance normalisation has a counter, and leaves it at zero.
        counters = {norm: norm.num_batches_tracked for norm, calls in norms.items() if calls}
        self._counters = {norm: counter for norm, counter in counters.items() if counter is not None}
        self._counted = {norm: counter.clone() for norm, counter in self._counters.items()}

    def own(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the layers hold what `take` reads: the statistics of the last forward pass."""
        return own_statistics(self._norms)

    @torch.no_grad()
    def begin(self) -> None:
        """Remember what a step starts from."""
        torch._foreach_copy_(self._running_views, self._buffers)
        for norm, counter in self._counters.items():
            self._counted[norm].copy_(counter)

    @torch.no_grad()
    def take(self, grain: int) -> None:
        """Take those of this process's `grain` (from 0)."""
        torch._foreach_copy_(self._row_views[grain], self._buffers)

    def send(self) -> dist.Work | None:
        """Send all to all; what to wait for before `advance`. Every process comes here."""
        if self._processes == 1:
            return None
        under_way: dist.Work | None = GATHER(self._all, self._rows, async_op=True)
        return under_way

    @torch.no_grad()
    def advance(self) -> None:
        """Put what all grains make of the running statistics into the layers."""
        momenta = self._momenta()
        added, kept = self._all * momenta, 1 - momenta
        for grain in range(self._grains):
            self._running.mul_(kept[grain]).add_(added[grain])
        torch._foreach_copy_(self._buffers, self._running_views)
        for norm, counter in self._counters.items():
            counter.copy_(self._counted[norm]).add_(self._norms[norm] * self._grains)

    def _momenta(self) -> torch.Tensor:
        """Momentum of each statistic in each grain, [G, S]: 1/n in the n-th pass of a layer that has none."""
        momenta = self._momentum.expand(self._grains, -1)
        without = [number for number, norm in enumerate(self._norms) if norm.momentum is None]
        if not without:
            return momenta
        momenta = momenta.clone()
        pieces, norms = torch.split(momenta, self._sizes, dim=1), list(self._norms)
        grains = torch.arange(1, self._grains + 1, dtype=torch.float64, device=momenta.device)
        for number in without:
            norm = norms[number]
            passes = self._counted[norm] + self._norms[norm] * grains
            for piece in pieces[2 * number : 2 * number + 2]:
                piece.copy_(1 / passes[:, None])
        return momenta
