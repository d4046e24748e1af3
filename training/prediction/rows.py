"""What is said of a picture as the cells of a row: its class, or each label with whether it was found.

Shapes: B samples, C classes or labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from training.prediction.views import Answers

Cell = str | float | int | None
NOT_FINITE = "the network gives numbers that are not finite"


class Column(NamedTuple):
    """A column of a table; what is not known of a sample has no value in it."""

    name: str
    kind: Literal["text", "number", "flag"]
    of_class: bool = False  # named after a class, so that another may have the name already


class Said(NamedTuple):
    """The cells that a task has for a picture, or what is wrong with it."""

    cells: list[Cell]
    error: str | None = None


def class_columns(classes: Sequence[str], top_k: int) -> list[Column]:
    """Of one class per picture: the likeliest and its score, then all scores, or the next likeliest."""
    columns = [Column("prediction", "text"), Column("score", "number")]
    for place in range(2, top_k + 1):
        columns += [Column(f"top{place}", "text"), Column(f"top{place}_score", "number")]
    return columns if top_k else columns + [Column(name, "number", of_class=True) for name in classes]


def class_cells(answers: Answers, classes: Sequence[str], top_k: int) -> list[Said]:
    """The cells of `class_columns` for each picture. Of equal classes the first one comes first."""
    scores_BC, ranking_BC = _on_host(answers.scores), _on_host(answers.ranking)
    rows: list[Said] = []
    for scores, ranking in zip(scores_BC, ranking_BC, strict=True):
        if not np.isfinite(ranking).all():
            rows.append(not_finite(2 * max(1, top_k) + (0 if top_k else len(classes))))
            continue
        best = np.argsort(-ranking, kind="stable")[: max(1, top_k)].tolist()
        cells: list[Cell] = []
        for place in best:
            cells += [classes[place], *numbers(scores[[place]])]
        rows.append(Said(cells if top_k else cells + numbers(scores)))
    return rows


def label_columns(labels: Sequence[str]) -> list[Column]:
    """Of any number of labels: the score of each, then whether each is found."""
    found = [Column(f"{name}_found", "flag", of_class=True) for name in labels]
    return [*(Column(name, "number", of_class=True) for name in labels), *found]


def label_cells(answers: Answers, thresholds: Sequence[float]) -> list[Said]:
    """The cells of `label_columns` for each picture; found is what has at least its threshold [C]."""
    scores_BC, probabilities_BC = _on_host(answers.scores), _on_host(answers.probabilities)
    finite_B: list[bool] = [bool(np.isfinite(ranking).all()) for ranking in _on_host(answers.ranking)]
    # In float32, as scores that were read back would be compared.
    found_BC = (probabilities_BC >= np.array(thresholds, np.float32)).astype(int)
    return [
        Said([*numbers(scores), *found.tolist()]) if finite else not_finite(2 * len(thresholds))
        for scores, found, finite in zip(scores_BC, found_BC, finite_B, strict=True)
    ]


def distinct(names: Iterable[str]) -> list[str]:
    """The same names, with ~2, ~3 … behind one that was there before: a class may be called "error"."""
    taken: set[str] = set()
    result = []
    for name in names:
        free, number = name, 1
        while free in taken:
            number += 1
            free = f"{name}~{number}"
        taken.add(free)
        result.append(free)
    return result


def not_finite(count: int) -> Said:
    """A picture of which nothing can be said."""
    return Said([None] * count, NOT_FINITE)


def numbers(values: NDArray[np.float32]) -> list[Cell]:
    """As the shortest decimals that read back as the same float32."""
    return [float(str(value)) for value in values]


def _on_host(tensor: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.cpu().numpy()
    return array
