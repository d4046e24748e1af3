"""Losses as a sum and a count over valid elements, so that a global mean is exact however the batch was cut.

Shapes: B samples, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F


class LossSum(NamedTuple):
    """Sum of the loss over valid elements, and their number; both 0-dimensional."""

    total: torch.Tensor
    elements: torch.Tensor


def cross_entropy(logits_BC: torch.Tensor, targets_B: torch.Tensor, valid_B: torch.Tensor) -> LossSum:
    """Negative log likelihood in nats of the softmax, in float32 whatever the precision of the logits."""
    losses_B = F.cross_entropy(logits_BC.float(), targets_B, reduction="none")
    return LossSum(torch.where(valid_B, losses_B, 0.0).sum(), valid_B.sum())
