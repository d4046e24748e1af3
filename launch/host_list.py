"""SLURM's short forms of lists: `n[1-3,7],m2` for host names, `4(x2),1` for numbers of each node; pure."""

from __future__ import annotations

import re

from training.config import UserError

MOST = 1 << 17  # entries: what does not fit is no cluster
_PART = re.compile(r"[^,\[\]]*(?:\[[^\[\]]*\][^,\[\]]*)*")
_RANGES = re.compile(r"[0-9]+(?:-[0-9]+)?(?:,[0-9]+(?:-[0-9]+)?)*")


def host_names(text: str, *, name: str) -> list[str]:
    """The host names of SLURM's short form, in order; USAGE that names the variable where it is none."""
    hosts: list[str] = []
    for part in _parts(text):
        hosts += _unfolded(part, text, name, room=MOST - len(hosts))
    if not hosts or not all(re.fullmatch(r"[A-Za-z0-9._-]+", host) for host in hosts):
        raise _no_list(text, name)
    return hosts


def node_counts(text: str, *, name: str) -> list[int]:
    """The numbers of SLURM's short form, one for each node: `4(x2),1` is 4, 4, 1; USAGE where it is none."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if match is None or len(counts) + int(match[2] or 1) > MOST:
            raise _no_list(text, name)
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _parts(text: str) -> list[str]:
    """Split at the commas that stand outside of brackets."""
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]


def _unfolded(part: str, text: str, name: str, *, room: int) -> list[str]:
    if not _PART.fullmatch(part):
        raise _no_list(text, name)
    before, bracket, rest = part.partition("[")
    if not bracket:
        return [part]
    inside, _, after = rest.partition("]")
    if not _RANGES.fullmatch(inside):
        raise _no_list(text, name)
    numbers: list[str] = []
    for one in inside.split(","):
        first, _, last = one.partition("-")
        if int(last or first) - int(first) >= room - len(numbers):
            raise _no_list(text, name)
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    ends = _unfolded(after, text, name, room=room // max(1, len(numbers)))
    return [f"{before}{number}{end}" for number in numbers for end in ends]


def _no_list(text: str, name: str) -> UserError:
    what = f"{name}={text[:80]!r} is not a list as SLURM writes them"
    return UserError(what, mend="start inside of a SLURM job, which sets it, or without it", code="USAGE")
