"""How processes ended, and what that means for the start they belonged to; pure."""

from __future__ import annotations

import signal
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from data_pipeline.fault import USER_EXIT
from launch.attempts import Outcome, exit_code_of, name_of
from training.vigil.ending import EXIT_CODES

STOPPED = EXIT_CODES["STOPPED"]
INTERRUPTED, PIPE_CLOSED = 128 + signal.SIGINT, 128 + signal.SIGPIPE
GOOD = (0, STOPPED)
# A process that ends with one of these has said why, or another one has.
SPOKEN = {USER_EXIT, *EXIT_CODES.values(), INTERRUPTED, PIPE_CLOSED}


class End(NamedTuple):
    """How one process ended."""

    rank: int
    code: int
    """exit code, or the signal that killed it, negative"""
    ours: bool = False
    """whether we killed it, because of others"""

    def words(self) -> str:
        """The same for a person."""
        if self.code >= 0:
            return f"process {self.rank} ended with exit code {self.code}"
        return f"process {self.rank} was killed by signal {-self.code} ({name_of_signal(-self.code)})"


def name_of_signal(number: int) -> str:
    """SIGKILL of 9; one of real time has no name of its own."""
    return signal.Signals(number).name if number in set(signal.Signals) else "SIGRT"


def is_bad(end: End) -> bool:
    """Whether the others cannot go on after this."""
    return end.code not in GOOD


def outcome_of(
    ends: Sequence[End], failure: Mapping[str, Any] | None, passed_on: Collection[int], *, learning: bool
) -> Outcome:
    """How a start ended: `ends` in the order they were seen, RUN/failure.json of this start, our signals.

    Nothing is flattened: the exit code is that of the process that failed first, or of failure.json's name.
    """
    bad = [end for end in ends if is_bad(end)]
    if not bad:
        what = failure["what"] if failure is not None else "stopped as asked"
        return Outcome(STOPPED, "STOPPED", what) if any(end.code for end in ends) else Outcome(0)
    if list(passed_on).count(signal.SIGINT) > 1:
        return Outcome(INTERRUPTED)
    return _as_seen(bad, passed_on, learning=learning) if failure is None else _as_written(bad, failure)


def _as_seen(bad: Sequence[End], passed_on: Collection[int], *, learning: bool) -> Outcome:
    own = [end for end in bad if not end.ours] or bad
    first = next((end for end in own if end.code > 0), own[0])
    if first.code in SPOKEN:
        return Outcome(first.code, name_of(first.code), first.words(), first.rank)
    if first.code > 0:
        return Outcome(first.code, "CRASH", f"{first.words()}, without a word", first.rank, spoken=False)
    if -first.code not in passed_on:
        memory = ", as the kernel does where memory runs out" if first.code == -signal.SIGKILL else ""
        return Outcome(EXIT_CODES["CRASH"], "CRASH", first.words() + memory, first.rank, spoken=False)
    if learning and -first.code != signal.SIGINT:
        # The signal came before the process was ready for it.
        return Outcome(STOPPED, "STOPPED", "stopped before training began", first.rank, spoken=False)
    return Outcome(128 - first.code, "", first.words(), first.rank)


def outcome_of_agent(
    end: End, failure: Mapping[str, Any] | None, passed_on: Collection[int], *, agent: str
) -> Outcome:
    """The same of torchrun or accelerate, which flattens exit codes: failure.json puts them right."""
    if end.code == 0:
        return Outcome(0)
    if list(passed_on).count(signal.SIGINT) > 1:
        return Outcome(INTERRUPTED)
    if failure is not None:
        return Outcome(exit_code_of(failure["code"]), failure["code"], failure["what"], failure["rank"])
    if end.code > 0:
        return Outcome(end.code, name_of(end.code), f"{agent} ended with exit code {end.code}")
    if -end.code in passed_on:
        return Outcome(128 - end.code)
    what = f"{agent} was killed by signal {-end.code} ({name_of_signal(-end.code)})"
    return Outcome(EXIT_CODES["CRASH"], "CRASH", what, spoken=False)


def _as_written(bad: Sequence[End], failure: Mapping[str, Any]) -> Outcome:
    name, rank = failure["code"], failure["rank"]
    own = next((end.code for end in bad if end.rank == rank and end.code > 0), exit_code_of(name))
    return Outcome(own, name, failure["what"], rank)
