"""What every task offers; the loop, evaluation and checkpoints know nothing else about it.

Scores are made from sums: `tally` gives sums over a batch's valid samples, sums add over batches and
processes, `score` divides at the very end. So a score is exact on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from training.inputs import Inputs
from training.losses import LossSum

Tally = dict[str, torch.Tensor]  # name -> 0-dimensional float64 sum


@dataclass(frozen=True)
class Task:
    """A task as three functions; `primary` names the score that chooses the best weights (more is better)."""

    outputs: int  # channels of the network's output
    primary: str
    sums: tuple[str, ...]  # names of what `tally` gives
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], LossSum]  # outputs, targets, weights
    tally: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Tally]  # outputs, targets, valid
    score: Callable[[Mapping[str, float]], dict[str, float]]  # sums over the split

    def batch_loss(self, outputs: torch.Tensor, inputs: Inputs) -> LossSum:
        """The loss of a batch; a mixed sample counts in part for its own target and its partner's."""
        if inputs.partner_targets is None:
            return self.loss(outputs, inputs.targets, inputs.weights)
        own = self.loss(outputs, inputs.targets, inputs.weights * inputs.share)
        other = self.loss(outputs, inputs.partner_targets, inputs.weights * (1 - inputs.share))
        return LossSum(own.total + other.total, own.elements + other.elements)
