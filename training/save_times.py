"""Notes how long it takes to save and to stop, for whoever has to leave a run that much time.

RUN/save_times.json: {"save": seconds of the longest save of this start, from the copy to the commit; "stop":
seconds from the signal to the commit, of the last start that was asked to stop}.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

SAVE_TIMES = "save_times.json"


class SaveTimes:
    """Of one start of a run; for process zero."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / SAVE_TIMES
        self._times: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
            self._times["stop"] = float(json.loads(self._path.read_text(encoding="utf-8"))["stop"])

    def saved(self, seconds: float) -> None:
        """A save took so long."""
        if seconds > self._times.get("save", 0.0):
            self._note("save", seconds)

    def stopped(self, seconds: float | None) -> None:
        """From the signal to the commit it took so long; None: there was no signal."""
        if seconds is not None:
            self._note("stop", seconds)

    def _note(self, name: str, seconds: float) -> None:
        self._times[name] = round(seconds, 3)
        part = self._path.with_name(f".{SAVE_TIMES}.part")
        with contextlib.suppress(OSError):  # nothing depends on it, and a full disk is told of by the saves
            try:
                part.write_text(json.dumps(self._times) + "\n", encoding="utf-8")
                part.replace(self._path)  # whoever reads sees all or nothing
            finally:
                part.unlink(missing_ok=True)
