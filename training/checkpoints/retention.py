"""Decides which checkpoints a run does without: a pure function of their steps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """What stays: the newest `keep`, and those whose step is a multiple of `every`, for good."""

    keep: int
    every: int | None = None


def dispensable(
    steps: Collection[int], retention: Retention, *, written: int, wanted: Collection[int] = ()
) -> list[int]:
    """Steps whose checkpoints may go now that the one of step `written` is whole, the oldest first.

    `wanted` are kept whatever their age. A step after `written` is never among them: nothing here has proved
    that it is not needed, and it does not count as one of the newest either.
    """
    older = sorted(step for step in set(steps) if step < written)
    rest = retention.keep - 1  # beside `written`
    aged = older[: len(older) - rest] if rest < len(older) else []
    stays = set(wanted)
    return [
        step for step in aged if step not in stays and not (retention.every and step % retention.every == 0)
    ]
