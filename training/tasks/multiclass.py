"""One class per image: accuracy, and what each class gets right.

Shapes: B samples, C classes.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from training.objective import Objective
from training.scores.confusion import (
    MAX_CONFUSION,
    ClassCounts,
    class_counts,
    f1,
    fraction,
    mean,
    precision,
    recall,
    shown,
)
from training.tasks.task import Findings, Kept, Sums, Tally, Task

TOP = 5


def multiclass(classes: int, *, outputs: int, objective: Objective) -> Task:
    """The task of telling `classes` classes apart; the network gives one logit for each."""
    assert outputs == classes
    # The matrix holds the counts of each class; of very many classes only these are counted.
    counted: dict[str, tuple[int, ...]] = {"confusion": (classes, classes)}
    if classes > MAX_CONFUSION:
        counted = dict.fromkeys(ClassCounts._fields, (classes,))
    return Task(
        outputs=outputs,
        objective=objective,
        primary="accuracy",
        sums={**counted, "top5": ()} if classes > TOP else counted,
        tally=partial(_tally, classes=classes),
        score=_score,
        probabilities=_probabilities,
    )


def _probabilities(logits_BC: torch.Tensor) -> torch.Tensor:
    return logits_BC.float().softmax(dim=1)


def _tally(logits_BC: torch.Tensor, targets_B: torch.Tensor, valid_B: torch.Tensor, *, classes: int) -> Tally:
    said_B = logits_BC.argmax(dim=1)
    if classes > MAX_CONFUSION:
        found = {
            "truth": _occurrences(targets_B, valid_B, classes),
            "said": _occurrences(said_B, valid_B, classes),
            "right": _occurrences(targets_B, valid_B & (said_B == targets_B), classes),
        }
    else:
        cells = _occurrences(targets_B * classes + said_B, valid_B, classes**2)
        found = {"confusion": cells.view(classes, classes)}
    if classes > TOP:
        hit_B = (logits_BC.topk(TOP, dim=1).indices == targets_B[:, None]).any(dim=1)
        found["top5"] = (hit_B & valid_B).sum().double()
    return found


def _occurrences(numbers_B: torch.Tensor, counts_B: torch.Tensor, size: int) -> torch.Tensor:
    """How often each of `size` numbers occurs where `counts_B`, float64 [size]."""
    # What does not count goes to a place of its own, which is cheaper than picking out the rest.
    found = torch.bincount(torch.where(counts_B, numbers_B + 1, 0), minlength=size + 1)
    assert len(found) == size + 1, "a target beyond the classes"
    return found[1:].double()


def _score(sums: Sums, kept: Kept | None) -> Findings:
    confusion = sums.get("confusion")
    if confusion is None:
        counts = ClassCounts(**{name: sums[name] for name in ClassCounts._fields})
    else:
        counts = class_counts(confusion)
    samples = counts.truth.sum()
    metrics = {"accuracy": fraction(counts.right.sum(), samples)}
    if "top5" in sums:
        metrics["top5"] = fraction(np.asarray(sums["top5"]).item(), samples)
    of_each = {"recall": recall(counts), "precision": precision(counts), "f1": f1(counts)}
    metrics["balanced_accuracy"] = mean(of_each["recall"])
    metrics["macro_f1"] = mean(of_each["f1"])
    return Findings(metrics, of_each, None if confusion is None else shown(confusion))
