"""The starts of one launch, one after the other: what is known of each, and whether another one follows."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

from launch.attempts import (
    NO_PROGRESS,
    Outcome,
    failure_of,
    newest_step,
    record_start,
    stamp_of,
    stuck,
    words_again,
)
from launch.options import Options
from launch.topology import Topology
from training.command import Request
from training.vigil.ending import EXIT_CODES, Failure, speak

PROGRAM = str(Path(__file__).parent.parent / "training" / "run.py")
AGAIN = "start the same command again to resume"
BY_HAND = "see failure.json in the run directory; the same command, typed again, starts it once more"


class Starts:
    """What a launcher remembers of its starts."""

    def __init__(self, options: Options, request: Request, words: list[str]) -> None:
        self.options, self.run_dir = options, request.run_dir
        self.learning = request.mode == "train" and not request.flags.dry_run
        self.number = 0
        self._words = words
        there = request.flags.fresh and (self.run_dir / "config.yaml").exists()
        self._aside = _inode(self.run_dir) if there else None  # the run that --fresh is to move aside
        self._expected = request.flags.expect_processes
        self._steps: list[int | None] = []  # of the newest checkpoint, before each start
        self._stamp = stamp_of(self.run_dir)

    def words(self, world: int) -> list[str]:
        """The arguments of the start that comes, of so many processes."""
        words = words_again(self._words) if self.number and not self._moves() else self._words
        return words if self._expected is not None else [*words, "--expect-processes", str(world)]

    def _moves(self) -> bool:
        """Whether --fresh has something to move aside still: a start may have failed before it did."""
        return self._aside is not None and _inode(self.run_dir) == self._aside

    def _newest(self) -> int | None:
        """The step that another start would go on from."""
        return None if self._moves() else newest_step(self.run_dir)

    def begin(self, topology: Topology) -> None:
        """A start begins now; the launcher of node 0 writes that down."""
        self._stamp = stamp_of(self.run_dir)
        if self.learning and topology.node_rank == 0:
            self._steps.append(self._newest())
            again = self.number > 0
            record_start(self.run_dir, again=again, processes=topology.world, nodes=topology.nodes)

    def failure(self) -> dict[str, Any] | None:
        """What failure.json says of this start."""
        return failure_of(self.run_dir, self._stamp)

    def may_follow(self, outcome: Outcome, *, asked: bool) -> bool:
        """Whether a start that ended so lets another one follow; not where a stop was `asked` for."""
        return outcome.restartable and not asked and self.number < self.options.max_restarts

    def after(self, outcome: Outcome, *, asked: bool) -> Outcome | None:
        """How the launch ends after a start that ended so, said; None where another start follows."""
        if not self.may_follow(outcome, asked=asked):
            if not outcome.spoken:
                self.say(outcome)
            return outcome
        if stuck([*self._steps, self._newest()]):
            # failure.json keeps the cause of the last one.
            what = f"error: {NO_PROGRESS}, the last: {first_line(outcome)}"
            failure = self._failure("CRASH", what, outcome.rank, BY_HAND)
            speak(f"{failure.what}\n{failure.line()}")
            return Outcome(EXIT_CODES["CRASH"], "CRASH", failure.what, outcome.rank)
        self.follow(outcome)
        return None

    def follow(self, outcome: Outcome) -> None:
        """Another start follows one that ended so."""
        self.number += 1
        step = self._newest()
        going_on = f"going on from step {step}" if step else "from the beginning"
        count = f"start {self.number + 1} of {self.options.max_restarts + 1}"
        speak(f"{count}: {first_line(outcome)}; {going_on}")

    def stopped_between(self, outcome: Outcome) -> Outcome:
        """How the launch ends when a stop was asked for between a start that ended so and the next; said."""
        step = self._newest()
        if step is None:
            if not outcome.spoken:
                self.say(outcome)
            return outcome
        what = f"stopped between two starts, when nothing was running; step {step} is saved"
        stopped = Outcome(EXIT_CODES["STOPPED"], "STOPPED", what, outcome.rank)
        self.say(stopped)
        return stopped

    def say(self, outcome: Outcome, *, writes: bool = True) -> None:
        """The last words of a start none of whose processes has said any; in failure.json too."""
        what = f"error: {outcome.what.removeprefix('error: ')}"
        what = outcome.what if outcome.name == "STOPPED" else what
        failure = self._failure(outcome.name or "CRASH", what, outcome.rank, AGAIN)
        if self.learning and writes:
            failure.write(self.run_dir, first=False)
        speak(f"{what}\n{failure.line()}")

    @staticmethod
    def _failure(code: str, what: str, rank: int, hint: str) -> Failure:
        return Failure(code, rank, socket.gethostname(), what, hint)


def _inode(folder: Path) -> int | None:
    """Which folder that is; None where there is none."""
    with contextlib.suppress(OSError):
        return folder.stat().st_ino
    return None


def first_line(outcome: Outcome) -> str:
    """Why it ended so, in a line."""
    lines = outcome.what.splitlines() or [f"it ended with exit code {outcome.exit_code}"]
    return lines[0].removeprefix("error: ")
