"""SLURM's short forms of lists: `n[1-3,7],m2` for host names, `4(x2),1` for numbers of each node; pure."""

from __future__ import annotations

import re

from training.config import UserError

MOST = 1 << 16  # entries: what does not fit is no cluster
LONGEST = 1 << 17  # characters: Linux takes no longer variable
BRACKETS = 4  # of one name: `r[1-2]c[1-8]`
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_PIECE = re.compile(r"([A-Za-z0-9._-]{0,255})\[([0-9,-]+)\]")
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
_COUNT = re.compile(r"([0-9]{1,6})(?:\(x([1-9][0-9]{0,5})\))?")


def host_names(text: str, *, name: str) -> list[str]:
    """The host names of SLURM's short form, in order; USAGE that names the variable where it is none."""
    hosts: list[str] = []
    for part in _parts(text) if len(text) <= LONGEST else []:
        unfolded = _unfolded(part, room=MOST - len(hosts))
        if not unfolded or not all(map(_NAME.fullmatch, unfolded)):
            raise _no_list(text, name)
        hosts += unfolded
    if not hosts:
        raise _no_list(text, name)
    return hosts


def node_counts(text: str, *, name: str) -> list[int]:
    """The numbers of SLURM's short form, one for each node: `4(x2),1` is 4, 4, 1; USAGE where it is none."""
    counts: list[int] = []
    for part in text.split(",") if len(text) <= LONGEST else [""]:
        match = _COUNT.fullmatch(part)
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


def _unfolded(part: str, *, room: int) -> list[str]:
    """The names of one part, the numbers of its last bracket running fastest; none where it is no list."""
    names, end = [""], 0
    for _ in range(BRACKETS):
        piece = _PIECE.match(part, end)
        if piece is None:
            break
        numbers = _numbers(piece[2], room=room // len(names))
        names = [f"{start}{piece[1]}{number}" for start in names for number in numbers]
        end = piece.end()
        if not names:
            return []
    # What is left has no brackets, or the name's check refuses it.
    return [f"{start}{part[end:]}" for start in names] if room else []


def _numbers(ranges: str, *, room: int) -> list[str]:
    """`08-10,12` is 08, 09, 10, 12; none where it is no list of ranges, or has no room."""
    numbers: list[str] = []
    for one in ranges.split(","):
        match = _RANGE.fullmatch(one)
        if match is None:
            return []
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 <= last - first < room - len(numbers):
            return []
        numbers += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return numbers


def _no_list(text: str, name: str) -> UserError:
    what = f"{name}={text[:80]!r} is not a list as SLURM writes them"
    return UserError(what, mend="start inside of a SLURM job, which sets it, or without it", code="USAGE")
