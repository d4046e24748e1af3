"""What a run says of a disk that fails it, and how often it lets that happen."""

from __future__ import annotations

import sys
from pathlib import Path

from data_pipeline.disk import room_at
from training.process import Ended


def warn(text: str) -> None:
    """A line on stderr, also of a run that was told to be quiet."""
    print(f"warning: {text}", file=sys.stderr, flush=True)  # noqa: T201 - beside the console, see above


def described(error: OSError, place: Path, needed: int) -> str:
    """What could not be written, why, and what is missing: path, bytes needed, bytes free."""
    what = error.strerror or str(error)
    try:
        free = f"{room_at(place).free:,} bytes free"
    except OSError:
        free = "nobody knows how many are free"
    return f"{error.filename or place}: {what}; {needed:,} bytes needed, {free}"


class FailedSaves:
    """Counts saves that failed in a row; `most` of them end the run."""

    def __init__(self, folder: Path, *, most: int) -> None:
        self._folder, self._most = folder, most
        self._row = 0
        self._last = ""

    @property
    def too_many(self) -> bool:
        """Whether the run has to end."""
        return self._row >= self._most

    @property
    def last_failed(self) -> bool:
        """Whether what was learned last is nowhere on the disk."""
        return self._row > 0

    def succeeded(self) -> None:
        """Count anew."""
        self._row = 0

    def failed(self, error: OSError, *, needed: int, newest: str | None) -> None:
        """Count one more and say so; `newest` is the checkpoint that the run would go on from."""
        self._row += 1
        self._last = described(error, self._folder, needed)
        warn(
            f"checkpoint {self._row} of {self._most} failed in a row: {self._last}; "
            f"newest good one: {newest or 'none'}"
        )

    def ended(self) -> Ended:
        """What the run ends with."""
        saves = "the last checkpoint" if self._row == 1 else f"the last {self._row} checkpoints"
        return Ended(
            "STORAGE",
            f"error: {saves} could not be written: {self._last}",
            hint="make room or mend the disk, then start the same command again",
        )


def tell_of_room(folder: Path, size: int) -> None:
    """Warn where the volume has no room for two checkpoints of `size` bytes."""
    room = room_at(folder)
    if room.free < 2 * size:
        warn(
            f"a checkpoint is {size:,} bytes, and '{room.volume}', where '{folder}' is, has {room.free:,} "
            "free: make room, or saves will fail"
        )
