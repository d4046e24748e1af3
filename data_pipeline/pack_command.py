"""The command `lockstep pack`: what it takes, and what it says."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.command_line import (
    Parser,
    counted,
    fraction,
    names,
    progress,
    say,
    shards_in_words,
    usable_cores,
    whole,
)
from data_pipeline.fault import UserError

if TYPE_CHECKING:
    from data_pipeline.items import Source
    from data_pipeline.pack import Packed

BAD_SHOWN = 10
KINDS = ("folders", "csv", "pairs")


def pack(argv: list[str]) -> None:
    """Write pictures and what is known of them into tars: `lockstep pack`."""
    options = _parser().parse(argv)
    _check_consistent(options)
    source, destination = _source(options), Path(options.dest)
    from data_pipeline import pack as packing
    from data_pipeline.packed_shard import Storage
    from data_pipeline.packing_plan import PackingOptions

    _say_found(source)
    storage = Storage(options.resize_shorter, options.reencode, options.quality)
    cut = PackingOptions(options.seed, options.shard_samples, options.shard_bytes, storage)
    if options.merge:
        _say_packed(packing.merge_parts(source, destination, cut), destination)
        return
    with progress("packing", len(source.items) // (options.part or (1, 1))[1]) as advance:
        if options.part:
            shards = packing.pack_part(
                source,
                destination,
                cut,
                part=options.part,
                workers=options.workers,
                progress=advance,
                say=say,
            )
        else:
            packed = packing.pack_whole(
                source,
                destination,
                cut,
                workers=options.workers,
                fresh=options.fresh,
                progress=advance,
                say=say,
            )
    if options.part:
        say(f"part {'/'.join(map(str, options.part))} is packed: {counted(shards, 'shard')}")
        say("next, when all parts are: the same command with --merge in place of --part")
    else:
        _say_packed(packed, destination)


def part_of(text: str) -> tuple[int, int]:
    """For argparse: I/N, one of N parts."""
    match = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N")
    return int(match[1]), int(match[2])


def _parser() -> Parser:
    parser = Parser(
        prog="lockstep pack",
        description="Write pictures into a data set of WebDataset tars. SOURCE holds a folder of pictures "
        "per class, or train/, val/ and test/ with a folder per class in each; or a folder of images beside "
        "one of masks; or it is a CSV file. Started again after it was broken off, it goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder of the pictures, or CSV; it is only read")
    parser.add_argument("dest", metavar="DEST", help="folder for the data set, empty or not there yet")
    _add_source_options(parser.add_argument_group("what the pictures are"))
    _add_storage_options(parser.add_argument_group("how they are stored"))
    _add_work_options(parser.add_argument_group("how the work is done"))
    return parser


def _add_source_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--kind", choices=KINDS, metavar="KIND", help=f"of SOURCE: {', '.join(KINDS)} (found by looking)")
    add("--images", metavar="DIR", help="folder of the pictures that a CSV names, or of pairs")
    add("--masks", metavar="DIR", help="folder of the masks, named like their pictures")
    add(
        "--labels",
        type=names,
        default=(),
        metavar="COL[,COL]",
        help="of a CSV: one of classes, or of 0 and 1",
    )
    add("--image-column", metavar="COL", help="of a CSV: the picture's file name")
    add("--split-column", metavar="COL", help="of a CSV: train, val or test")
    add("--group-column", metavar="COL", help="of a CSV: what is never divided, such as a patient")
    add(
        "--classes",
        type=names,
        default=(),
        metavar="A,B,…",
        help="their names, in the order of their numbers",
    )
    add(
        "--val-fraction",
        type=fraction,
        default=0.2,
        metavar="X",
        help="of each class, held out (%(default)s)",
    )
    add("--seed", type=whole(0, 2**63 - 1), default=0, metavar="N", help="of the order (%(default)s)")


def _add_storage_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--shard-samples",
        type=whole(1, 10**9),
        default=10_000,
        metavar="N",
        help="samples in a tar, at most (%(default)s)",
    )
    add(
        "--shard-bytes",
        type=whole(1, 2**40),
        default=2**28,
        metavar="N",
        help="bytes of pictures in a tar, about (%(default)s)",
    )
    add(
        "--resize-shorter",
        type=whole(1, 10**5),
        metavar="N",
        help="make pictures smaller whose shorter side has more than N pixels",
    )
    add("--reencode", action="store_true", help="make progressive JPEGs baseline: 2.8x faster to decode")
    add("--quality", type=whole(1, 100), default=90, metavar="N", help="of JPEGs made anew (%(default)s)")


def _add_work_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--workers", type=whole(1, 1024), default=usable_cores(), metavar="N", help="processes (%(default)s)")
    add("--part", type=part_of, metavar="I/N", help="the I-th of N parts only, from 1; DEST is shared by all")
    add("--merge", action="store_true", help="sum up the parts, when all of them are packed")
    add("--fresh", action="store_true", help="start over: drop what another packing left unfinished in DEST")


def _check_consistent(options: argparse.Namespace) -> None:
    """The next packing would take a data set inside SOURCE for one more class."""
    together = [flag for flag in ("part", "merge", "fresh") if getattr(options, flag)]
    if len(together) > 1:
        raise UserError(
            f"--{together[0]} and --{together[1]} exclude each other",
            mend="parts are packed first, then merged; to start over with parts, remove DEST",
            code="USAGE",
        )
    destination, read = Path(options.dest), Path(options.source)
    for name in filter(None, (options.source, options.images, options.masks)) if read.is_dir() else ():
        if destination.resolve().is_relative_to(Path(name).resolve()):
            what = "SOURCE" if name == options.source else "the folder"
            raise UserError(
                f"DEST '{destination}' lies inside {what} '{name}'",
                mend="give a folder outside of it",
                code="USAGE",
            )


def _source(options: argparse.Namespace) -> Source:
    from data_pipeline.items import SourceOptions
    from data_pipeline.packing_state import check_begun, check_free
    from data_pipeline.sources import find_source

    check_free(Path(options.dest))
    if options.merge:
        check_begun(Path(options.dest))
    return find_source(
        Path(options.source),
        SourceOptions(
            kind=options.kind,
            images=Path(options.images) if options.images else None,
            val_fraction=options.val_fraction,
            seed=options.seed,
            label_columns=options.labels,
            image_column=options.image_column,
            split_column=options.split_column,
            group_column=options.group_column,
            classes=options.classes,
            masks=Path(options.masks) if options.masks else None,
        ),
    )


def _say_found(source: Source) -> None:
    one = "label" if source.task == "multilabel" else "class"
    classes = (
        [counted(len(source.classes), one, "classes" if one == "class" else "")] if source.classes else []
    )
    say(f"found {source.kind}: {', '.join([*classes, counted(len(source.items), 'picture')])}")


def _say_packed(packed: Packed, destination: Path) -> None:
    for name, split in packed.dataset.splits.items():
        say(f"  {name}: {shards_in_words(split)}")
    _say_left_out(packed.bad, destination)
    for remark in packed.remarks:
        say(remark)
    say(f"the data set is in {destination}")
    say(f"next: lockstep show {shlex.quote(str(destination))}")


def _say_left_out(bad: tuple[tuple[str, str], ...], destination: Path) -> None:
    if not bad:
        return
    from data_pipeline.packing_state import BAD_FILES

    say(f"left out {len(bad):,} that cannot be read (listed in {destination / BAD_FILES}):")
    for path, reason in bad[:BAD_SHOWN]:
        say(f"  {path}: {reason}")
    if len(bad) > BAD_SHOWN:
        say(f"  and {len(bad) - BAD_SHOWN:,} more")
