"""The commands `lockstep pack` and `lockstep show`: what they take, and what they say."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

from data_pipeline.fault import UserError

BAD_SHOWN = 10
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


def pack(argv: list[str]) -> None:
    """Write a folder of pictures into tars: `lockstep pack`."""
    options = _pack_parser().parse(argv)
    source_root, destination = Path(options.source), Path(options.dest)
    _check_apart(source_root, destination)
    from data_pipeline.sources import class_folders

    source = class_folders(source_root, val_fraction=options.val_fraction, seed=options.seed)
    from data_pipeline import pack as packing
    from data_pipeline.show import counted, shards_in_words

    packing.check_free(destination)
    found = counted(len(source.classes), "class", "classes"), counted(len(source.pictures), "picture")
    _say(f"found {source.kind}: {', '.join(found)}")
    with _progress(len(source.pictures)) as advance:
        packed = packing.pack(
            source,
            destination,
            workers=options.workers,
            seed=options.seed,
            shard_samples=options.shard_samples,
            shard_bytes=options.shard_bytes,
            progress=advance,
        )
    for name, split in packed.dataset.splits.items():
        _say(f"  {name}: {shards_in_words(split)}")
    _say_left_out(packed.bad, destination / packing.BAD_FILES)
    _say(f"the data set is in {destination}")
    _say(f"next: lockstep show {shlex.quote(str(destination))}")


def show(argv: list[str]) -> None:
    """Draw a grid of a data set's pictures and print its table of classes: `lockstep show`."""
    options = _show_parser().parse(argv)
    from rich.console import Console

    from data_pipeline.index import read_dataset
    from data_pipeline.show import class_table, facts, write_grid

    root = Path(options.dataset)
    out = Path(options.out) if options.out else root / "samples.png"
    dataset = read_dataset(root)
    write_grid(root, dataset, split=options.split, samples=options.samples, out=out)
    Console(markup=False, highlight=False, emoji=False).print(class_table(dataset))
    for fact in facts(dataset):
        _say(fact)
    _say(f"the picture grid is in {out}")


def usable_cores() -> int:
    """The cores that this process may run on: on a shared machine often fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pack_parser() -> Parser:
    parser = Parser(
        prog="lockstep pack",
        description="Write pictures into a data set of WebDataset tars. SOURCE holds a folder of pictures "
        "per class, or train/, val/ and test/ with a folder per class in each.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder of the pictures; it is only read")
    parser.add_argument("dest", metavar="DEST", help="folder for the data set, empty or not there yet")
    add = parser.add_argument
    add(
        "--workers", type=_whole(1, 1024), default=usable_cores(), metavar="N", help="processes (%(default)s)"
    )
    add(
        "--val-fraction",
        type=_fraction,
        default=0.2,
        metavar="X",
        help="of each class, held out (%(default)s)",
    )
    add("--seed", type=_whole(0, 2**63 - 1), default=0, metavar="N", help="of the order (%(default)s)")
    add(
        "--shard-samples",
        type=_whole(1, 10**9),
        default=10_000,
        metavar="N",
        help="samples in a tar, at most (%(default)s)",
    )
    add(
        "--shard-bytes",
        type=_whole(1, 2**40),
        default=2**28,
        metavar="N",
        help="bytes of pictures in a tar, at most (%(default)s)",
    )
    return parser


def _show_parser() -> Parser:
    parser = Parser(
        prog="lockstep show",
        description="Draw a grid of a data set's pictures, and print how many there are of each class.",
        allow_abbrev=False,
    )
    parser.add_argument("dataset", metavar="DATASET", help="folder of a packed data set")
    add = parser.add_argument
    add("--split", default="train", metavar="NAME", help="whose pictures to draw (%(default)s)")
    add("--samples", type=_whole(1, 1000), default=40, metavar="N", help="how many of them (%(default)s)")
    add("--out", metavar="FILE.png", help="where to write the grid (DATASET/samples.png)")
    return parser


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parsed(text: str) -> int:
        if not re.fullmatch("[0-9]{1,20}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return parsed


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return value


def _check_apart(source: Path, destination: Path) -> None:
    """The next packing would take a data set inside SOURCE for one more class."""
    if source.is_dir() and destination.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"DEST '{destination}' lies inside SOURCE '{source}'",
            mend="give a folder outside of it",
            code="USAGE",
        )


@contextmanager
def _progress(pictures: int) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, nothing in a file or a pipe."""
    from rich.progress import Progress

    with Progress(transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("packing", total=pictures)
        yield partial(bar.advance, task)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _say_left_out(bad: tuple[tuple[str, str], ...], listed: Path) -> None:
    if not bad:
        return
    _say(f"left out {len(bad):,} that cannot be read (listed in {listed}):")
    for path, reason in bad[:BAD_SHOWN]:
        _say(f"  {path}: {reason}")
    if len(bad) > BAD_SHOWN:
        _say(f"  and {len(bad) - BAD_SHOWN:,} more")
