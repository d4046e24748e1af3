"""Whether a job goes on: everybody's signs of progress, added up, and for how long there was none."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from training.vigil.ending import SHOWN
from training.vigil.place import Place
from training.vigil.verdict import Sight

TICK = 0.5  # seconds between two looks
ANSWERS = 2.5  # seconds after which a process that says nothing does not answer
OURS = Path(__file__).parent.parent.parent
# Where a process that waits for the others stands: in a collective, also one at the end of a backward pass.
WAITS = ("torch/distributed/", "torch/autograd/", "accelerate/utils/operations.py", "training/counts.py")

Message = dict[str, Any]


class Pace:
    """Of this process and of those that it is connected with: of all for process zero.

    A process that rests, or compiles its network in its first step, goes on by declaration.
    """

    def __init__(self, place: Place, *, compiles: bool) -> None:
        self._place, self._compiles = place, compiles
        self._ticked, self._rested = time.monotonic(), 0
        self._progress: tuple[int, ...] = ()
        self._main = threading.main_thread().ident
        self._told: dict[int, tuple[float, Message]] = {}  # what each said last, and when
        self.silence = 0.0  # seconds without progress of anybody

    def due(self, now: float) -> bool:
        """It is time to look."""
        return now - self._ticked >= TICK

    def heard(self, rank: int, message: Message, now: float) -> None:
        """Another process said how far it is."""
        self._told[rank] = (now, message)

    def look(self, now: float) -> Message:
        """See what goes on; what the others are to know of it.

        Time in which this process itself did not run (stopped, suspended) is no silence.
        """
        place, elapsed = self._place, min(now - self._ticked, 2 * TICK)
        self._ticked = now
        compiling = self._compiles and place.step == place.first_step
        self._rested += place.resting or compiling
        mine = place.beats + self._rested
        progress = (mine, *(int(message.get("beats", 0)) for _, message in self._told.values()))
        self.silence = 0.0 if progress != self._progress else self.silence + elapsed
        self._progress = progress
        if place.rank == 0:
            return {"beats": sum(progress)}
        return {"beats": mine, **self._own()}

    def _own(self) -> Message:
        """Where this process is; the line only where it stays there."""
        place = self._place
        at = _main_thread_at(self._main) if self.silence else {}
        return {"step": place.step, "samples": place.samples[:SHOWN], **at}

    def sights(self, now: float) -> dict[int, Sight]:
        """What is known of each process."""
        known = {rank: (now - since <= ANSWERS, message) for rank, (since, message) in self._told.items()}
        known[self._place.rank] = (True, self._own())
        return {rank: _sight(answers, message) for rank, (answers, message) in sorted(known.items())}


def _sight(answers: bool, message: Mapping[str, Any]) -> Sight:
    return Sight(
        answers=answers,
        step=message.get("step"),
        samples=tuple(message.get("samples", ())),
        doing=message.get("doing", ""),
        waits=message.get("waits", False),
    )


def _main_thread_at(main: int | None) -> Message:
    """The line of ours that the main thread stands at, and whether it waits there for other processes."""
    frame: FrameType | None = sys._current_frames().get(main or 0)
    waits = frame is not None and any(part in frame.f_code.co_filename for part in WAITS)
    while frame is not None and not _is_ours(frame):
        frame = frame.f_back
    if frame is None:
        return {"waits": waits}
    path = Path(frame.f_code.co_filename).relative_to(OURS).as_posix()
    return {"doing": f"{path}:{frame.f_lineno} in {frame.f_code.co_name}", "waits": waits}


def _is_ours(frame: FrameType) -> bool:
    packages = (f"{OURS}/training/", f"{OURS}/data_pipeline/")
    return frame.f_code.co_filename.startswith(packages)
