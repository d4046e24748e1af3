"""How the launchers of several machines agree on how a start ended: node 0 hears all, and says it to all."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from launch.attempts import Outcome
from launch.children import heed
from launch.ends import INTERRUPTED, STOPPED
from launch.links import Links
from launch.stop_signals import StopSignals
from training.vigil.ending import EXIT_CODES

LONGEST = 660.0  # seconds for process zero to write its last checkpoint, and for the others to hear of it
PATIENCE = 10.0  # seconds for the others to see their processes out, once one has failed


class Verdict(NamedTuple):
    """How a start ended on all nodes."""

    outcome: Outcome
    node: int  # because of which
    who: str  # the same for a person
    again: bool | None = None  # whether another start follows; None: nobody has decided

    def as_json(self) -> dict[str, Any]:
        """What the other nodes are told."""
        return {**self._asdict(), "outcome": self.outcome._asdict()}


def agree(links: Links, signals: StopSignals, mine: Outcome) -> Verdict:
    """Node 0 hears how the processes of all nodes ended; how the start did, and because of which node."""
    until = time.monotonic() + LONGEST
    while links.waits_for("over") and not signals.at_once and time.monotonic() < until:
        heed(signals, links)
        if links.failed():
            until = min(until, time.monotonic() + PATIENCE)
    said = links.said("over")
    overs = {0: mine} | {number: _outcome(over) for number, over in said.items()}
    failed = [*links.failures, *links.waits_for("over")]
    for number in failed:
        outcome = overs.get(number) or links.gone(number)
        if outcome.exit_code not in (0, STOPPED):
            return Verdict(outcome, number, links.name_of(number))
    if signals.at_once:
        return Verdict(Outcome(INTERRUPTED), 0, links.name_of(0))
    number = next((number for number, outcome in overs.items() if outcome.exit_code), 0)
    return Verdict(overs[number], number, links.name_of(number))


def hear_verdict(links: Links, signals: StopSignals, mine: Outcome) -> Verdict:
    """Another node tells node 0 how its processes ended, and hears how the start did."""
    links.tell({"over": mine._asdict()})
    until = time.monotonic() + LONGEST
    while links.waits_for("verdict") and not signals.at_once and time.monotonic() < until:
        heed(signals, links)
        links.hear()
    said = links.said("verdict").get(0)
    if isinstance(said, dict):
        outcome, node = _outcome(said.get("outcome")), said.get("node")
        return Verdict(
            outcome, node if isinstance(node, int) else 0, str(said.get("who")), said.get("again") is True
        )
    outcome = Outcome(INTERRUPTED) if signals.at_once else links.gone(0)
    return Verdict(outcome, 0, links.name_of(0))


def _outcome(said: object) -> Outcome:
    """What another launcher says of an end."""
    try:
        assert isinstance(said, dict)
        return Outcome(int(said["exit_code"]), str(said["name"]), str(said["what"]), int(said["rank"]))
    except (AssertionError, KeyError, TypeError, ValueError):
        return Outcome(EXIT_CODES["CRASH"], "CRASH", "another launcher speaks another language")
