"""What the commands of this package share: a parser whose mistakes are ours, plain lines, a progress bar."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from data_pipeline.fault import UserError

if TYPE_CHECKING:
    from data_pipeline.index import Split

OPTION = re.compile(r"--?[A-Za-z].*")


class Parser(argparse.ArgumentParser):
    """argparse that raises USAGE instead of ending the process, and names the option that was meant."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, mend=f"{self.prog} --help lists what it takes", code="USAGE")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Parse all of `argv`. Unknown options first: argparse would complain of what they left behind."""
        known = list(self._option_string_actions)
        for word in argv[: argv.index("--")] if "--" in argv else argv:
            option = word.split("=", 1)[0]
            if OPTION.fullmatch(option) and option not in known:
                near = difflib.get_close_matches(option, known, n=1)
                meant = f"did you mean {near[0]}? " if near else ""
                mend = f"{meant}{self.prog} --help lists what it takes"
                raise UserError(f"unknown option {option}", mend=mend, code="USAGE")
        return self.parse_args(argv)


def usable_cores() -> int:
    """The cores that this process may run on: on a shared machine often fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def whole(least: int, most: int) -> Callable[[str], int]:
    """For argparse: a whole number within limits."""

    def parsed(text: str) -> int:
        if not re.fullmatch("[0-9]{1,20}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return parsed


def fraction(text: str) -> float:
    """For argparse: a number from 0 to below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return value


def names(text: str) -> tuple[str, ...]:
    """For argparse: names with commas between them, none of them twice."""
    found = tuple(name.strip() for name in text.split(","))
    if not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different names: A,B,C")
    return found


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, nothing in a file or a pipe."""
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield partial(bar.advance, task)


def say(line: str) -> None:
    """One line on stdout, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def counted(count: int, one: str, more: str = "") -> str:
    """A number and its noun."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def shards_in_words(split: Split) -> str:
    """Samples, tars and bytes of a split."""
    from rich.filesize import decimal

    size = sum(shard.bytes for shard in split.shards)
    return f"{counted(split.samples, 'sample')} in {counted(len(split.shards), 'shard')}, {decimal(size)}"
