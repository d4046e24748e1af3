"""Who meets: what members say of themselves, and what of it cannot be."""

from __future__ import annotations

import itertools
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from training.config import UserError
from training.vigil.ending import Ended

SHOWN = 16  # missing numbers that a message lists

About = dict[str, Any]


class Kind(NamedTuple):
    """What meets, in words, and the names of what says which one it is, and of how many."""

    one: str
    several: str
    number: str
    expected: str
    wait: str


PROCESSES = Kind("process", "processes", "RANK", "WORLD_SIZE", "LOCKSTEP_WAIT=SECONDS")
NODES = Kind("node", "nodes", "--node-rank", "--nodes", "--wait SECONDS")


class Member(NamedTuple):
    """One of those who met."""

    number: int
    about: About  # `number`, `expected`, `host`, `pid`, `life`, and what it says of itself beside
    connection: socket.socket | None = None  # where connections are kept; never to oneself


class Meeting(NamedTuple):
    """What came of it."""

    members: tuple[Member, ...]
    """by number: all, for the host, with itself; the host alone, for the others"""
    verdict: dict[str, Any]
    address: str
    """of the host, as other machines than its own reach it; for the host, "" where there is none"""
    port: int
    own_address: str
    """of this side, towards the others"""


def introduction(mine: Mapping[str, Any], number: int, expected: int) -> About:
    """What a member says of itself."""
    # Containers may have all of this alike, so that there is a number that nobody else has.
    place = {"host": socket.gethostname(), "pid": os.getpid(), "life": secrets.token_hex(8)}
    return {"number": number, "expected": expected, **place, **mine}


def check_numbers(abouts: Sequence[About], kind: Kind) -> None:
    """UserError where what two of them say cannot both be; `abouts` are in order of their numbers."""
    zero = abouts[0]
    for before, about in itertools.pairwise(abouts):
        who = f"{kind.one} {about['number']} on {about['host']}"
        if about["expected"] != zero["expected"]:
            what = f"{who} was started for {about['expected']} {kind.several} ({kind.expected}), "
            what += f"{kind.one} 0 on {zero['host']} for {zero['expected']}"
        elif about["number"] >= zero["expected"]:
            what = f"{who}: {kind.number} counts from 0, and there are {zero['expected']} {kind.several}"
        elif about["number"] == before["number"]:
            places = " and ".join(f"pid {one['pid']} on {one['host']}" for one in (before, about))
            what = f"two {kind.several} have {kind.number} {about['number']}: {places}"
        else:
            continue
        mend = f"give each {kind.one} a {kind.number} of its own, and all the same {kind.expected}"
        raise UserError(what, mend=mend, code="USAGE")


def missing(abouts: Sequence[About], seconds: float, kind: Kind) -> Ended:
    """Who is not there."""
    there = {about["number"] for about in abouts}
    expected = int(abouts[0]["expected"])
    numbers = [str(number) for number in range(expected) if number not in there]
    shown = ", ".join(numbers[:SHOWN]) + (f" and {len(numbers) - SHOWN} more" if numbers[SHOWN:] else "")
    what = f"error: {len(there)} of {expected} {kind.several} came within {seconds:g} seconds: "
    what += f"missing {kind.number} {shown}"
    hint = f"see why {'it was' if len(numbers) == 1 else 'they were'} not started, or could not reach "
    hint += f"{abouts[0]['host']}; to wait longer: {kind.wait}"
    return Ended("RENDEZVOUS", what, hint=hint)
