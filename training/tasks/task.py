"""What every task offers; the loop, evaluation, prediction and checkpoints know nothing else about it.

Scores are made from sums: `tally` gives sums over a batch's valid samples, sums add over batches and
processes, `score` divides at the very end. So a score is exact on any number of processes. What no sum gives
(areas under curves) is made from rows that are kept on the CPU and gathered once, after the pass.
Shapes: B samples, N samples of the split, C classes or labels, H W pixels, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray

from training.objective import Objective

Tally = dict[str, torch.Tensor]  # name -> float64 sums of a fixed shape
Sums = Mapping[str, NDArray[Any]]  # the same, over the split
LOWER_IS_BETTER = ("loss", "train_loss")


class Kept(NamedTuple):
    """Rows of samples in the split's order: what no sum replaces."""

    outputs: NDArray[Any]  # float32 [N, C], logits
    targets: NDArray[Any]  # int8 [N, C]


@dataclass(frozen=True)
class Findings:
    """What an evaluation found. None: a score that is not defined, such as AUROC of one class only."""

    metrics: dict[str, float | None]
    classes: dict[str, list[float | None]] = field(default_factory=dict)  # score -> [C], of each class
    confusion: list[list[int]] | None = None  # [C, C]: rows are the truth, columns what was said
    thresholds: list[float] | None = None  # [C], probabilities that give the best F1


@dataclass(frozen=True)
class Task:
    """A task as functions; `primary` names the score that chooses the best weights."""

    outputs: int  # O, channels of the network's output
    objective: Objective
    primary: str
    sums: Mapping[str, tuple[int, ...]]  # what `tally` gives: name -> shape
    tally: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Tally]  # outputs, targets, valid
    score: Callable[[Sums, Kept | None], Findings]  # without the loss, which is the objective's
    probabilities: Callable[[torch.Tensor], torch.Tensor]  # logits -> the same shape
    keeps_rows: bool = False  # outputs and targets [B, C] of every sample are kept for `score`


def is_better(metric: str, value: float, before: float) -> bool:
    """Whether a score beats the best one so far."""
    return value < before if metric in LOWER_IS_BETTER else value > before
