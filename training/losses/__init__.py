"""The losses by name, and the objective that a run minimises: their weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from training.config.loss import LossTerms
from training.losses.elements import Labels as Labels
from training.losses.overlap import dice, iou, tversky
from training.losses.own import own_loss
from training.losses.pointwise import bce, cross_entropy, focal
from training.objective import Objective, Term

LOSSES: dict[str, Callable[[Any, Labels], Term]] = {
    "cross_entropy": cross_entropy,
    "bce": bce,
    "focal": focal,
    "dice": dice,
    "iou": iou,
    "tversky": tversky,
}


def outputs_of(task: str, classes: int, spec: LossTerms) -> int:
    """Channels of the network's output: one where bce tells two classes of pixels apart, else one a class."""
    yes_or_no = task == "segmentation" and classes == 2 and spec.bce is not None
    return 1 if yes_or_no else classes


def build_objective(spec: LossTerms, labels: Labels) -> Objective:
    """The weighted sum that `spec` names; CONFIG where a loss does not fit the task."""
    ours = [(term.weight, LOSSES[name](term, labels)) for name, term in spec.terms.items()]
    own = [(term.weight, own_loss(path, term, labels)) for path, term in spec.own.items()]
    return Objective((*ours, *own))
