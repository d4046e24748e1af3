"""Ends a run whose evaluations show no progress any more; pure functions of the scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

from training.config.train import EarlyStop


@dataclass(frozen=True)
class Waiting:
    """How long a run has waited for progress of `metric`."""

    metric: str = ""
    best: float | None = None
    evaluations: int = 0  # in a row without progress


def after_score(
    waiting: Waiting, value: float | None, *, spec: EarlyStop, metric: str, lower_is_better: bool
) -> Waiting:
    """`waiting` after one more evaluation. A score that is not defined or not finite is no progress.

    Progress is more than `spec.threshold` beyond the best score so far, so that a slow climb counts too once
    it adds up. Where another metric is looked at than before, the count begins anew.
    """
    if waiting.metric != metric:
        waiting = Waiting(metric)
    if value is None or not math.isfinite(value):
        return Waiting(metric, waiting.best, waiting.evaluations + 1)
    gained = math.inf if waiting.best is None else value - waiting.best
    if lower_is_better and waiting.best is not None:
        gained = -gained
    if gained > spec.threshold:
        return Waiting(metric, value)
    return Waiting(metric, waiting.best, waiting.evaluations + 1)


def why_over(waiting: Waiting, spec: EarlyStop | None) -> str:
    """Why the run is over, in words; empty where it is not."""
    if spec is None or waiting.evaluations < spec.patience:
        return ""
    more = f" by more than {spec.threshold:g}" if spec.threshold else ""
    best = "was never defined" if waiting.best is None else f"is {waiting.best:.4f} at best"
    return (
        f"{waiting.metric} has not got better{more} in {waiting.evaluations} evaluations "
        f"(train.early_stop); it {best}"
    )
