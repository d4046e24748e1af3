"""One class per image: cross-entropy, accuracy.

Shapes: B samples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from training.losses import cross_entropy
from training.tasks.task import Tally, Task


def multiclass(classes: int) -> Task:
    """The task of telling `classes` classes apart."""
    return Task(
        outputs=classes,
        primary="accuracy",
        sums=("right", "loss", "count"),
        loss=cross_entropy,
        tally=_tally,
        score=_score,
    )


def _tally(logits_BC: torch.Tensor, targets_B: torch.Tensor, valid_B: torch.Tensor) -> Tally:
    loss = cross_entropy(logits_BC, targets_B, valid_B.float())
    right_B = (logits_BC.argmax(dim=1) == targets_B) & valid_B
    return {"right": right_B.sum().double(), "loss": loss.total.double(), "count": loss.elements.double()}


def _score(sums: Mapping[str, float]) -> dict[str, float]:
    return {"accuracy": sums["right"] / sums["count"], "loss": sums["loss"] / sums["count"]}
