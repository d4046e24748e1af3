"""The command `lockstep index`: what it takes, and what it says."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.command_line import Parser, counted, progress, say, shards_in_words, usable_cores, whole
from data_pipeline.fault import UserError

if TYPE_CHECKING:
    from data_pipeline.foreign import Indexed

SHOWN = 10


def index(argv: list[str]) -> None:
    """Write an index for tars that others made, as they are: `lockstep index`."""
    options = _parser().parse(argv)
    from data_pipeline.foreign import IndexOptions, index_tars
    from data_pipeline.member_kinds import Wish, detect
    from data_pipeline.shard_files import assign_splits, find_shards, split_rule

    rules = [split_rule(one) for one in options.split]
    splits = assign_splits(find_shards(options.shards), rules, val_shards=options.val_shards)
    tars = [tar for one in splits.values() for tar in one]
    destination = Path(options.out) if options.out else tars[0].parent
    named = _class_names(options)
    for name, one in splits.items():
        say(
            f"{name}: {counted(len(one), 'shard')}, {one[0].name}"
            + (f" to {one[-1].name}" if one[1:] else "")
        )
    reading = detect(tars, Wish(options.image, options.target, options.field))
    say(reading.in_words())
    how = IndexOptions(
        named, options.skip_incomplete, options.key_scope == "shard", options.force, options.workers
    )
    with progress("indexing", 2 * len(tars)) as advance:
        done = index_tars(splits, destination, reading, options=how, progress=advance)
    _say_result(done)
    say(f"the index is in {destination}")
    say(f"next: lockstep show {shlex.quote(str(destination))}")


def _parser() -> Parser:
    parser = Parser(
        prog="lockstep index",
        description="Make a data set of WebDataset tars as they are: an index for each, and dataset.json. "
        "The tars are only read. What their members are is found out and said; the options overrule it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "shards", nargs="+", metavar="SHARDS", help="a folder, tars, a glob, or a range: train-{000..003}.tar"
    )
    add("--out", metavar="DEST", help="folder for the index (that of the tars)")
    add("--image", type=_names, default=(), metavar="EXT[,EXT]", help="members that are the image")
    add("--target", default="", metavar="EXT", help="member with the label: cls, json, txt, mask.png, ...")
    add(
        "--field",
        type=_names,
        default=(),
        metavar="NAME[,NAME]",
        help="of JSON: one class, or labels of 0/1/null",
    )
    add("--classes", type=_names, default=(), metavar="A,B", help="names of the classes, in their order")
    add("--classes-file", metavar="FILE", help="the same, one a line")
    add(
        "--split",
        action="append",
        default=[],
        metavar="NAME=GLOB",
        help="shards of a split; may be given again",
    )
    add("--val-shards", type=whole(0, 10**6), default=0, metavar="N", help="the last N of train become val")
    add(
        "--key-scope", choices=("split", "shard"), default="split", help="where keys are unique (%(default)s)"
    )
    add("--skip-incomplete", action="store_true", help="leave out samples without image or target")
    add("--force", action="store_true", help="replace a data set that is there")
    add("--workers", type=whole(1, 1024), default=usable_cores(), metavar="N", help="processes (%(default)s)")
    return parser


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different names: A,B,C")
    return tuple(name.removeprefix(".") for name in names)


def _class_names(options: argparse.Namespace) -> tuple[str, ...]:
    if options.classes_file is None:
        named: tuple[str, ...] = options.classes
        return named
    if options.classes:
        raise UserError("--classes and --classes-file are both given", mend="give one of them", code="USAGE")
    try:
        lines = Path(options.classes_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read --classes-file '{options.classes_file}': {error}",
            mend="name a text file (UTF-8) with one class a line",
            code="USAGE",
        ) from None
    names = tuple(line.strip() for line in lines)
    if not names or not all(names) or len(set(names)) != len(names):
        raise UserError(
            f"'{options.classes_file}' is not a list of different names",
            mend="write one class a line, none twice, no empty line",
            code="USAGE",
        )
    return names


def _say_result(done: Indexed) -> None:
    dataset, totals = done.dataset, done.totals
    for name, split in dataset.splits.items():
        say(f"  {name}: {shards_in_words(split)}")
    names = ", ".join(map(repr, dataset.classes[:SHOWN])) + (" ..." if dataset.classes[SHOWN:] else "")
    what = "labels" if dataset.task == "multilabel" else "classes"
    say(f"{len(dataset.classes):,} {what}: {names}")
    for reason, count in totals.ignored.items():
        first, _, rest = reason.partition(" ")
        never = " (never opened)" if reason.startswith("unsupported") else ""
        kind = f"member {reason}" if first == "without" else f"{first} member {rest}".rstrip()
        say(f"ignored: {count:,} {kind.replace('member', 'members') if count > 1 else kind}{never}")
    if totals.no_image or totals.no_target:
        say(f"left out: {totals.no_image:,} without an image, {totals.no_target:,} without a target")
    for name in totals.empty[:SHOWN]:
        say(f"left out: {name} holds no samples")
    learned = "train" if "train" in dataset.splits else "all"
    say(f"mean and std are of {counted(done.decoded, 'image')} over {learned}, mode {dataset.image_mode}")
    if done.broken:
        say(
            f"warning: {counted(len(done.broken), 'image')} of them cannot be decoded, first {done.broken[0]}"
        )
    _say_missing(done)


def _say_missing(done: Indexed) -> None:
    """What training will need, or not find."""
    splits, classes = done.dataset.splits, done.dataset.classes
    if "train" not in splits:
        say("warning: there is no train split: name its shards with --split train=GLOB")
    elif "val" not in splits:
        say("warning: there is no val split, which training needs: --val-shards N, or --split val=GLOB")
    counts = splits["train"].class_counts if "train" in splits else (1,)
    if unseen := [name for name, count in zip(classes, counts, strict=False) if not count]:
        listed = ", ".join(map(repr, unseen[:3])) + (f" and {len(unseen) - 3:,} more" if unseen[3:] else "")
        say(f"warning: train holds nothing of {listed}")
