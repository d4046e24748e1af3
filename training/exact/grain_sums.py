"""What is kept of the grains of a step: sums of their gradients, and their running statistics in order."""

from __future__ import annotations

import contextlib

import torch

from training.exact.flat_gradients import FlatGradients, used_in_some_passes
from training.exact.running_statistics import RunningStatistics


class GrainSums:
    """Lent to one step after the other: `begin`, then `take` for each grain, then `finish`."""

    def __init__(
        self,
        gradients: FlatGradients,
        statistics: RunningStatistics | None,
        unused: dict[str, torch.nn.Parameter],
    ) -> None:
        """`statistics`: None where no layer keeps any; `unused`: parameters that no pass uses."""
        self._gradients, self._statistics, self._unused = gradients, statistics, unused

    def own_statistics(self) -> contextlib.AbstractContextManager[None]:
        """Inside, forward passes leave their own running statistics behind, which `take` reads."""
        return contextlib.nullcontext() if self._statistics is None else self._statistics.own()

    def begin(self) -> None:
        """Before the first forward pass of a step."""
        if self._statistics is not None:
            self._statistics.begin()

    def take(self, grain: int) -> None:
        """After the backward pass of this process's `grain` (from 0); CONFIG if it used other parameters."""
        for name, parameter in self._unused.items():
            if parameter.grad is not None:
                raise used_in_some_passes(name)
        self._gradients.take(grain)
        if self._statistics is not None:
            self._statistics.take(grain)

    def finish(self) -> None:
        """Leave the gradient in the parameters and the statistics in the layers; every process comes here."""
        if self._statistics is None:
            self._gradients.give()
            return
        # The statistics travel beside the gradients: waiting for them costs no second round.
        under_way = self._statistics.send()
        self._gradients.give()
        if under_way is not None:
            under_way.wait()
        self._statistics.advance()
