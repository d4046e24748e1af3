"""Any number of labels per image, each there, not there or not known: areas under curves, F1, exact matches.

Shapes: B samples of a batch, N samples of the split, C labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.objective import Objective
from training.scores.confusion import ClassCounts, Scores, f1, fraction, mean
from training.scores.ranking import Areas, areas, best_threshold, rank
from training.tasks.task import Findings, Kept, Sums, Tally, Task

DECIDED = 0.5  # the probability from which on a label counts as said, in F1 and exact matches


def multilabel(classes: int, *, outputs: int, objective: Objective) -> Task:
    """The task of saying which of `classes` labels an image has; the network gives one logit for each."""
    assert outputs == classes
    return Task(
        outputs=outputs,
        objective=objective,
        primary="auroc",
        sums={},
        tally=_tally,
        score=_score,
        probabilities=_probabilities,
        keeps_rows=True,
    )


def _probabilities(logits_BC: torch.Tensor) -> torch.Tensor:
    return logits_BC.float().sigmoid()


def _tally(_outputs: torch.Tensor, _targets: torch.Tensor, _valid: torch.Tensor) -> Tally:
    """Nothing: every score is made from the rows that are kept."""
    return {}


def _score(_sums: Sums, kept: Kept | None) -> Findings:
    assert kept is not None
    logits_NC, targets_NC = kept
    probabilities_NC: NDArray[np.float32] = _probabilities(torch.tensor(logits_NC)).numpy()
    said_NC = probabilities_NC >= DECIDED
    # By logits: of large ones the probabilities are all 1.
    under_curves = _areas(logits_NC, targets_NC)
    of_each = {**under_curves, "f1": f1(_counts(said_NC, targets_NC))}
    metrics = {name: mean(scores) for name, scores in of_each.items()}
    metrics["exact_match"] = _exact_match(said_NC, targets_NC)
    of_each["positives"] = [float(count) for count in (targets_NC == 1).sum(axis=0)]
    columns = zip(probabilities_NC.T, targets_NC.T, strict=True)
    return Findings(metrics, of_each, thresholds=[best_threshold(*column) for column in columns])


def _areas(logits_NC: NDArray[Any], targets_NC: NDArray[Any]) -> dict[str, Scores]:
    each_once = np.ones((1, len(targets_NC)), np.int32)
    columns = zip(logits_NC.T, targets_NC.T, strict=True)
    found = [areas(rank(*column), each_once) for column in columns]
    values = {name: [getattr(one, name).item() for one in found] for name in Areas._fields}
    return {name: [None if np.isnan(one) else one for one in column] for name, column in values.items()}


def _counts(said_NC: NDArray[np.bool_], targets_NC: NDArray[Any]) -> ClassCounts:
    truth_NC = targets_NC == 1
    said_NC = said_NC & (targets_NC >= 0)
    return ClassCounts(truth_NC.sum(axis=0), said_NC.sum(axis=0), (said_NC & truth_NC).sum(axis=0))


def _exact_match(said_NC: NDArray[np.bool_], targets_NC: NDArray[Any]) -> float | None:
    """The share of samples whose every known label is right, of those that have a known label."""
    known_NC = targets_NC >= 0
    wrong_NC = known_NC & (said_NC != (targets_NC == 1))
    counted_N = known_NC.any(axis=1)
    return fraction((counted_N & ~wrong_NC.any(axis=1)).sum(), counted_N.sum())
