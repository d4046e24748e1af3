"""Which process of a job stands still: a pure function of what is known of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sight:
    """What is known of a process whose job shows no progress."""

    answers: bool  # whether its vigil still speaks
    stopped: bool = False  # from outside
    step: int | None = None  # under way, from 0
    samples: tuple[str, ...] = ()
    doing: str = ""  # the line of ours that its main thread stands at
    waits: bool = False  # whether that line waits for the other processes

    def words(self) -> str:
        """The same in words."""
        if self.stopped:
            state = "was stopped from outside (SIGSTOP)"
        elif not self.answers:
            state = "does not answer: it is stopped, or never gives up the interpreter's lock"
        else:
            state = f"is at {self.doing or 'an unknown place'}"
            state += ", waiting for the others" if self.waits else ""
        step = "no step" if self.step is None else f"step {self.step + 1}"
        return f"{step}, {state}" if self.answers else f"{step} when last heard of, {state}"


def stands_still(sights: Mapping[int, Sight]) -> list[int]:
    """Ranks of those that the others wait for, lowest first; empty where that cannot be told.

    First those that do not answer; then those behind the others; then those that wait for nobody, where
    others wait.
    """
    silent = [rank for rank, sight in sights.items() if sight.stopped or not sight.answers]
    if silent:
        return sorted(silent)
    steps = {rank: -1 if sight.step is None else sight.step for rank, sight in sights.items()}
    last = [rank for rank in steps if steps[rank] == min(steps.values())]
    busy = [rank for rank in last if not sights[rank].waits]
    if len(sights) == 1 or 0 < len(busy) < len(sights):
        return sorted(busy or sights)
    return sorted(last) if len(last) < len(sights) else []
