"""What `lockstep doctor` can find: the kinds with their mending, one finding, and a bounded list of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

HURTS, NOTE = "hurts", "note"
# Of one kind in one shard. Where there is more it is the shard that is wrong, and ten million findings would
# need more memory than the training.
LIMIT = 1000


class Kind(NamedTuple):
    """How much a finding of this kind matters, and how to mend it."""

    severity: str
    mend: str
    of_many: bool = False  # one finding for all samples of a split; its place is that of the first of them


_COPY = "copy the shard again from where it was whole, or make the data set again"
_AGAIN = "make the indexes again: lockstep pack, or lockstep index for tars that you have not packed here"
_SOURCE = "mend or remove it at its source and make the data set again"

KINDS = {
    # The files.
    "dataset-file": Kind(HURTS, "make the data set again"),
    "shard-missing": Kind(HURTS, "put the shard back, or make the data set again"),
    "shard-size": Kind(HURTS, _COPY),
    "shard-checksum": Kind(HURTS, _COPY),
    "shard-named-twice": Kind(HURTS, _AGAIN),
    "index-damaged": Kind(HURTS, _AGAIN),
    "tar-damaged": Kind(HURTS, _COPY),
    "not-in-tar": Kind(HURTS, _AGAIN),
    "wrong-place": Kind(HURTS, _AGAIN),
    "keys-digest": Kind(HURTS, _AGAIN),
    "class-counts": Kind(HURTS, _AGAIN),
    "key-twice": Kind(HURTS, "give each sample of a split its own key and make the data set again"),
    # Samples.
    "damaged-member": Kind(HURTS, _COPY),
    "unreadable": Kind(HURTS, "add it to the tar, or make the indexes again without the sample"),
    "undecodable": Kind(HURTS, _SOURCE),
    "mask-unreadable": Kind(HURTS, _SOURCE),
    "mask-size": Kind(HURTS, "give the mask the size of its image and make the data set again"),
    "mask-value": Kind(HURTS, "mend the mask, or name its value as a class when the data set is made"),
    # Labels and contents.
    "label-range": Kind(HURTS, "mend the label at its source and make the data set again"),
    "label-differs": Kind(HURTS, _AGAIN),
    "labels-column": Kind(HURTS, _AGAIN),
    "same-picture-other-label": Kind(HURTS, "decide which label is right and remove the other sample"),
    "leak": Kind(HURTS, "remove it from one of the splits: a score on what was learned says nothing"),
    "class-without-training": Kind(HURTS, "add samples of it to train, hold out fewer, or remove the class"),
    "no-label-given": Kind(HURTS, "give labels in this column, or leave the column out"),
    "too-few-samples": Kind(HURTS, "a smaller --train.global-batch, or more samples"),
    "empty-split": Kind(HURTS, "put samples into it, or make the data set without it"),
    # What is worth knowing.
    "same-picture": Kind(NOTE, "remove all but one, unless it shall weigh more"),
    "stranger": Kind(NOTE, "nothing reads it: move it away, or make the data set again if it belongs to it"),
    "leftover": Kind(NOTE, "of a program that was broken off: remove it"),
    "not-in-index": Kind(NOTE, "training does not see them; lockstep index takes them in"),
    "no-train-split": Kind(NOTE, "name the split to learn from: --data.train-split NAME"),
    "class-without-validation": Kind(NOTE, "hold out some of it, or its score stays unknown"),
    "one-sided-label": Kind(NOTE, "add samples without it, or leave the column out"),
    "imbalance": Kind(NOTE, "draw the classes alike: --data.balance 1"),
    "one-class-masks": Kind(
        NOTE, "nothing to do if they are meant; else look at how the masks were made", of_many=True
    ),
    "statistics": Kind(NOTE, "make the data set again, or set mean and std in dataset.json"),
    "large-shards": Kind(NOTE, "smaller ones are fetched and cached better: lockstep pack --shard-bytes"),
    "tiny-shards": Kind(NOTE, "larger ones open faster: lockstep pack --shard-samples, --shard-bytes"),
    "uneven-shards": Kind(NOTE, "nodes share them unevenly: smaller ones with lockstep pack --shard-bytes"),
    "progressive": Kind(
        NOTE, "they take 2.8 times as long to decode: lockstep pack --reencode", of_many=True
    ),
    "large-pictures": Kind(
        NOTE, "decoding them takes most of the time: lockstep pack --resize-shorter N", of_many=True
    ),
    "thin-pictures": Kind(
        NOTE, "look whether they are what you mean: a crop shows little of them", of_many=True
    ),
    "tiny-pictures": Kind(
        NOTE, "look whether they are what you mean: they are enlarged many times", of_many=True
    ),
    "coloured": Kind(
        NOTE, 'they are made grey; for colours make the data set again with the mode "RGB"', of_many=True
    ),
    "all-grey": Kind(NOTE, 'one channel would do: make the data set again with the mode "L"', of_many=True),
    "sixteen-bit": Kind(
        NOTE, "only the upper 8 bits are read; scale them before packing if need be", of_many=True
    ),
    "turned": Kind(NOTE, "readers disagree on the tag: lockstep pack stores them upright", of_many=True),
    "animated": Kind(NOTE, "only their first picture is seen", of_many=True),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was found; `shard` and `key` are empty and `offset` (bytes in the tar) None if of none.

    `other` is the key of the other sample where two are concerned; `count` how many things it stands for;
    `mending` says how to mend it where that differs from others of its kind.
    """

    code: str
    what: str
    shard: str = ""
    key: str = ""
    offset: int | None = None
    other: str = ""
    count: int = 1
    mending: str = ""

    @property
    def kind(self) -> Kind:
        """Its severity, and how things of its kind are mended."""
        return KINDS[self.code]

    @property
    def mend(self) -> str:
        """How to mend it."""
        return self.mending or self.kind.mend

    def as_json(self) -> dict[str, Any]:
        """For machines: empty fields are null."""
        fields = {name: None if value == "" else value for name, value in asdict(self).items()}
        del fields["mending"]
        return {"severity": self.kind.severity, **fields, "mend": self.mend}


class Findings:
    """Findings of one part of the work in order: the first LIMIT of a kind and shard, the rest is counted."""

    def __init__(self) -> None:
        self._kept: list[Finding] = []
        self._counts: dict[tuple[str, str], int] = {}

    def add(self, finding: Finding) -> None:
        """Keep or count one more."""
        place = finding.code, finding.shard
        self._counts[place] = self._counts.get(place, 0) + 1
        if self._counts[place] <= LIMIT:
            self._kept.append(finding)

    def all(self) -> tuple[Finding, ...]:
        """What was kept, and one finding for each kind and shard of which there was more."""
        more = [
            Finding(code, f"{count - LIMIT:,} more like these", shard, count=count - LIMIT)
            for (code, shard), count in self._counts.items()
            if count > LIMIT
        ]
        return (*self._kept, *more)
