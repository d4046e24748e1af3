"""Losses as a sum and a count over valid elements, so that a global mean is exact however the batch was cut.

Shapes: B samples, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F


class LossSum(NamedTuple):
    """Sum of the loss over valid elements, and of their weights (their number); both 0-dimensional."""

    total: torch.Tensor
    elements: torch.Tensor


def cross_entropy(logits_BC: torch.Tensor, targets_B: torch.Tensor, weights_B: torch.Tensor) -> LossSum:
    """Negative log likelihood in nats of the softmax, in float32 whatever the precision of the logits.

    `weights_B`, float32: 1 for a sample that counts, 0 for one that does not, between them for the part of a
    mixed sample that has this target.
    """
    losses_B = F.cross_entropy(logits_BC.float(), targets_B, reduction="none")
    return LossSum(torch.where(weights_B > 0, losses_B * weights_B, 0.0).sum(), weights_B.sum())
