"""Sums up what came of all foreign tars, and settles which classes the data set has.

Shapes: C classes (multilabel: labels; segmentation: classes of pixels).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.draws import IntArray
from data_pipeline.fault import UserError
from data_pipeline.index import IMAGE_EXTENSIONS, Shard, Split
from data_pipeline.member_kinds import Reading
from data_pipeline.pixel_values import pixel_classes
from data_pipeline.shard_draft import NAMED, Draft, DraftFiles
from data_pipeline.spread import rows_by_shard, spread
from data_pipeline.targets import MAX_CLASSES, MAX_LABELS, NUMBER, from_list

FAULTS = 10  # tars that cannot be used and are named, at most
FEW = 1000  # class numbers that need not all occur


class Classes(NamedTuple):
    """The names of the classes [C] and, of masks, their values [C]."""

    names: tuple[str, ...]
    mask_values: tuple[int, ...] = ()


@dataclass
class SplitTotals:
    """The sums over the tars of a split; `shards` have no checksum of their index yet."""

    shards: list[Shard] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    pixels: IntArray = field(default_factory=lambda: np.zeros(256, np.int64))
    keys_digest: int = 0

    def add(self, draft: Draft) -> None:
        """One more tar."""
        self.shards.append(Shard(draft.name, draft.samples, draft.bytes, draft.sha256, ""))
        self.counts.update(dict(zip(draft.names, draft.counts, strict=True)))
        self.pixels += np.array(draft.pixels or [0] * 256, np.int64)
        self.keys_digest = (self.keys_digest + draft.keys_digest) % 2**64

    def as_split(self, classes: Classes, index_sums: dict[str, str]) -> Split:
        """The split of dataset.json, with the SHA-256 of each tar's index."""
        shards = [
            Shard(one.name, one.samples, one.bytes, one.sha256, index_sums[one.name]) for one in self.shards
        ]
        by_class = [self.counts[name] for name in classes.names]
        if classes.mask_values:
            by_class = self.pixels[list(classes.mask_values)].tolist()
        return Split(tuple(shards), tuple(by_class), f"{self.keys_digest:016x}")


@dataclass
class Totals:
    """The sums over all tars; `splits` without those that hold no samples."""

    splits: dict[str, SplitTotals] = field(default_factory=dict)
    given: Counter[str] = field(default_factory=Counter)  # labels that are not missing
    widths: set[int] = field(default_factory=set)  # how many names each tar has
    largest: tuple[int, str, str] = (-1, "", "")  # class number, tar and key
    images: set[str] = field(default_factory=set)  # extensions
    ignored: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)
    no_image: int = 0
    no_target: int = 0
    incomplete: list[str] = field(default_factory=list)  # the first, in words

    def add(self, split: str, draft: Draft) -> None:
        """One more tar."""
        self.ignored.update(draft.ignored)
        self.no_image += draft.no_image.samples
        self.no_target += draft.no_target.samples
        for what, lacking in (("image", draft.no_image), ("target", draft.no_target)):
            room = max(NAMED - len(self.incomplete), 0)
            self.incomplete += [f"{key!r} in {draft.name} has no {what}" for key in lacking.keys[:room]]
        if not draft.samples:
            self.empty.append(draft.name)
            return
        self.splits.setdefault(split, SplitTotals()).add(draft)
        self.given.update(dict(zip(draft.names, draft.given, strict=True)))
        self.widths.add(len(draft.names))
        self.images |= set(draft.images)
        for name, key in zip(draft.names, draft.first, strict=False):
            if NUMBER.fullmatch(name) and int(name) > self.largest[0]:
                self.largest = int(name), draft.name, key


def summed(splits: dict[str, list[Path]], drafts: DraftFiles, *, named: int) -> Totals:
    """The sums over all tars, `named` classes having names; DATA or UNSAFE that lists the unusable tars."""
    totals = Totals()
    faults: list[UserError] = []
    for split, tars in splits.items():
        for tar in tars:
            draft = drafts.read(tar.name)
            if isinstance(draft, UserError):
                faults.append(draft)
            elif not faults:
                totals.add(split, draft)
                _check_number(len(totals.given), max(MAX_CLASSES, named))  # before captions fill the memory
    if faults:
        more = [f"and {len(faults) - FAULTS:,} more tars that cannot be used"] if faults[FAULTS:] else []
        what = "\n".join([*(one.what for one in faults[:FAULTS]), *more])
        worst = next((one for one in faults if one.code == "UNSAFE"), faults[0])
        raise UserError(what, mend=worst.mend, code=worst.code, place=worst.place)
    return totals


def image_extensions(reading: Reading, totals: Totals) -> tuple[str, ...]:
    """The members that are images, in the order in which they are looked for."""
    if reading.image:
        return reading.image
    return tuple(sorted(totals.images, key=lambda one: (IMAGE_EXTENSIONS.index(one.lower()), one)))


def settle_classes(totals: Totals, reading: Reading, named: tuple[str, ...]) -> Classes:
    """The classes of the data set, `named` by the user or found; DATA where they make no sense."""
    if reading.task == "segmentation":
        pixels = sum((split.pixels for split in totals.splits.values()), np.zeros(256, np.int64))
        return Classes(*pixel_classes(named, np.flatnonzero(pixels).tolist()))
    found = totals.given.keys()
    if reading.task == "multilabel":
        return Classes(_label_names(totals, reading, named))
    if named:
        return Classes(named)
    if not all(map(_is_plain, found)):
        _check_number(len(found), MAX_CLASSES)
        return Classes(tuple(sorted(found)))
    number, shard, key = totals.largest
    if number >= FEW and len(found) * 20 <= number:
        raise UserError(
            f"'{shard}': sample {key!r} has the class number {number}, but only {len(found)} different ones "
            f"occur, allowed would be 0 to {len(found) - 1}",
            mend="mend the label; if there are so many classes, name them: --classes-file FILE",
            place={"shard": shard, "member": key},
        )
    return Classes(tuple(map(str, range(number + 1))))


def _label_names(totals: Totals, reading: Reading, named: tuple[str, ...]) -> tuple[str, ...]:
    found = totals.given.keys()
    if reading.kind == "fields":
        names = named or reading.fields
    else:
        if from_list(found) and len(totals.widths) > 1:
            raise UserError(
                f"the lists of labels are of different lengths, up to {len(found)}",
                mend="give every sample a list of all labels, null for a missing one",
            )
        names = named or tuple(sorted(found, key=int) if from_list(found) else sorted(found))
    _check_number(len(names), MAX_LABELS)
    if never := [name for name in names if not totals.given[name]]:
        raise UserError(
            f"the label {never[0]!r} has no value in any sample",
            mend="check its name, or leave it out: --field, --classes",
        )
    return names


def _check_number(count: int, limit: int) -> None:
    if count > limit:
        raise UserError(
            f"there are {count:,} different labels, at most {limit:,} can be classes: are they captions?",
            mend="name the member and the field that hold labels: --target EXT, --field NAME",
        )


def _is_plain(name: str) -> bool:
    """A number as it is written without zeros in front."""
    return NUMBER.fullmatch(name) is not None and str(int(name)) == name


def looked_at(splits: Sequence[SplitTotals], count: int) -> dict[str, tuple[int, ...]]:
    """Rows of each tar, `count` samples in all at even distances over these splits."""
    shards = [shard for split in splits for shard in split.shards]
    sizes = [shard.samples for shard in shards]
    rows = rows_by_shard(spread(sum(sizes), count), sizes)
    return {shard.name: tuple(here.tolist()) for shard, here in zip(shards, rows, strict=True)}
