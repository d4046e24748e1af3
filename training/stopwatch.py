"""What the seconds of a training went into, on this process."""

from __future__ import annotations

import time

PARTS = ("data", "copy", "compute", "reduce", "optimizer", "checkpoint", "other")


class Stopwatch:
    """Counts seconds for one of PARTS at a time: whoever begins something else switches over."""

    def __init__(self) -> None:
        self.totals = dict.fromkeys(PARTS, 0.0)
        self._lap = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "other", time.perf_counter()

    def switch(self, part: str) -> None:
        """From now on seconds belong to `part`."""
        now = time.perf_counter()
        self._lap[self._part] += now - self._since
        self._part, self._since = part, now

    def lap(self) -> dict[str, float]:
        """The seconds of each part since the last time here."""
        self.switch(self._part)
        lap, self._lap = self._lap, dict.fromkeys(PARTS, 0.0)
        for part, seconds in lap.items():
            self.totals[part] += seconds
        return lap
