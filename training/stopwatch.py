"""What the seconds of a training went into, on this process.

A program runs ahead of a GPU, so there the clock is the GPU's: events are laid into its stream between the
pieces of work, and read when they have passed. A part's seconds are then those in which the stream worked for
it or stood idle because of it; waiting for data costs nothing as long as computing hides it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

PARTS = ("data", "copy", "compute", "reduce", "optimizer", "checkpoint", "other")  # of a step
BESIDE = ("start", "evaluation")  # of a run, and of none of its steps


class Clock(Protocol):
    """Makes marks and tells how far apart two of them are; a mark is used for nothing else."""

    def mark(self) -> Any:
        """Now."""

    def between(self, first: Any, second: Any) -> float:
        """Seconds."""

    def settle(self, last: Any) -> None:
        """Wait until `last`, the latest of the marks that are to be read, has passed."""

    def take_back(self, marks: list[Any]) -> None:
        """They are not needed any more."""


class HostClock:
    """The time of the program itself."""

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def between(self, first: float, second: float) -> float:
        """Seconds."""
        return second - first

    def settle(self, last: float) -> None:
        """It has passed."""

    def take_back(self, marks: list[float]) -> None:
        """Numbers need no keeping."""


class StreamClock:
    """The time of the stream of a GPU that a program gives its work to; a mark never makes anybody wait."""

    def __init__(self) -> None:
        self._spare: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        """When all has been done that the calling thread's stream was given so far."""
        event = self._spare.pop() if self._spare else _new_event()
        event.record()
        return event

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """Seconds."""
        return float(first.elapsed_time(second)) / 1000

    def settle(self, last: torch.cuda.Event) -> None:
        """Wait for it; a step's marks have passed when its sums, which are read first, have come."""
        last.synchronize()

    def take_back(self, marks: list[torch.cuda.Event]) -> None:
        """Events are used again."""
        self._spare += marks


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Lap:
    """Marks of a stretch of time, whose seconds can be read when it has passed on the device too."""

    clock: Clock
    begun: list[tuple[str, Any]]  # a part, and the mark where it began; each lasts until the next begins
    end: Any

    def seconds(self) -> dict[str, float]:
        """Seconds by part, all PARTS and whatever else there was; to be read once."""
        self.clock.settle(self.end)
        marks = [mark for _, mark in self.begun]
        spent = dict.fromkeys(PARTS, 0.0)
        for (part, mark), until in zip(self.begun, [*marks[1:], self.end], strict=True):
            spent[part] = spent.get(part, 0.0) + self.clock.between(mark, until)
        self.clock.take_back(marks)
        return spent


class Stopwatch:
    """Counts seconds for one part at a time: whoever begins something else switches over, in any thread."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.totals = dict.fromkeys((*PARTS, *BESIDE), 0.0)  # of all laps that were read
        self._clock = clock or HostClock()
        self._begun = [("other", self._clock.mark())]

    def follow(self, device: torch.device) -> None:
        """Count from here, by the clock of what computes."""
        self._clock = StreamClock() if device.type == "cuda" else HostClock()
        self._begun = [("other", self._clock.mark())]

    def switch(self, part: str) -> None:
        """From now on seconds belong to `part`."""
        if part != self._begun[-1][0]:
            self._begun.append((part, self._clock.mark()))

    def lap(self) -> Lap:
        """The time since the last call; what is under way goes on in the next lap."""
        end = self._clock.mark()
        lap = Lap(self._clock, self._begun, end)
        self._begun = [(self._begun[-1][0], end)]
        return lap

    def read(self, lap: Lap) -> dict[str, float]:
        """The seconds of a lap by part, which from now on are in `totals`."""
        return self._counted(lap.seconds())

    def started(self) -> None:
        """Everything since the last lap was preparation, whatever it was, but for an evaluation."""
        spent = self.lap().seconds()
        evaluation = spent.pop("evaluation", 0.0)
        self._counted({"start": sum(spent.values()), "evaluation": evaluation})
        self.switch("other")

    def _counted(self, seconds: dict[str, float]) -> dict[str, float]:
        for part, spent in seconds.items():
            self.totals[part] += spent
        return seconds


def added(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Seconds of both, by part."""
    return {part: one.get(part, 0.0) + other.get(part, 0.0) for part in {**one, **other}}
