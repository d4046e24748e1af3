"""Where a process is and whether it goes on: what its last words mention, and what the vigil looks at."""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from training.vigil.ending import Ending


class Watcher(Protocol):
    """What the main thread may ask of the vigil over its job."""

    def settle(self, patience: float) -> Ending | None:
        """How the job ends, as soon as that is known; None after `patience` seconds."""

    def announce(self, ending: Ending) -> None:
        """Tell the other processes how the job ends."""

    def part(self) -> None:
        """All went well here; from now on a process that ends without a word may have done so too."""

    def stop(self) -> None:
        """All went well everywhere: nobody has to be watched any more."""


@dataclass
class Place:
    """Where this process is, as far as it knows; the main thread writes, the vigil reads."""

    run_dir: Path | None = None
    rank: int = field(default_factory=lambda: _number("RANK") or 0)
    step: int | None = None  # under way, from 0
    samples: list[str] = field(default_factory=list)  # keys of the micro-batch under way
    beats: int = 0  # goes up with every sign of progress
    began: float = field(default_factory=time.monotonic)  # when this process did
    together: bool = False
    """whether the processes have joined: from then on a mistake is one process's own"""
    resting: bool = True
    """whether this takes its time and shows no progress: set-up, the last checkpoint, plots"""
    first_step: int | None = None  # that this start took
    watcher: Watcher | None = None
    listener: socket.socket | None = None
    """of process zero: where the processes have met, before torch was there"""

    def at(self, *, step: int | None = None, samples: list[str] | None = None) -> None:
        """Something goes on: here. What follows must go on as well."""
        self.step = self.step if step is None else step
        self.samples = self.samples if samples is None else samples
        self.first_step = self.step if self.first_step is None else self.first_step
        self.resting = False
        self.beats += 1

    def rest(self) -> None:
        """What follows may take any time, until the next sign of progress."""
        self.resting = True

    def find_rank(self) -> None:
        """Read this process's number again, as what started it had another name for it."""
        self.rank = _number("RANK") or 0

    def joined(self, rank: int) -> None:
        """From now on the processes know one another."""
        self.rank, self.together = rank, True

    @property
    def speaks(self) -> bool:
        """Whether this process reports a user's mistake that all of them make: one on each machine does.

        One that has no place among the others is alone with its mistake.
        """
        local = _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else _number("SLURM_LOCALID")
        return self.together or not local or self.rank >= (_number("WORLD_SIZE") or 1)

    @property
    def done(self) -> int | None:
        """The step under way, counted as in metrics.jsonl: from 1."""
        return None if self.step is None else self.step + 1


def _number(name: str) -> int | None:
    text = os.environ.get(name, "0")
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None
