"""What a network is trained to do, by name: its loss, its sums over a split, its scores."""

from __future__ import annotations

from collections.abc import Callable

from training.config.loss import LossTerms
from training.losses import Labels, build_objective
from training.tasks.multiclass import multiclass
from training.tasks.multilabel import multilabel
from training.tasks.segmentation import segmentation
from training.tasks.task import Task

TASKS: dict[str, Callable[..., Task]] = {
    "multiclass": multiclass,
    "multilabel": multilabel,
    "segmentation": segmentation,
}


def make_task(labels: Labels, loss: LossTerms) -> Task:
    """The task that labels are of, with the loss that is asked for; CONFIG where they do not go together."""
    return TASKS[labels.task](labels.classes, outputs=labels.outputs, objective=build_objective(loss, labels))
