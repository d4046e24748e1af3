"""Compares the index of a shard with what its tar holds, member by member."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipeline.findings import Finding, Findings
from data_pipeline.index import DatasetIndex, Shard
from data_pipeline.shard_index import Place, ShardIndex


@dataclass(frozen=True)
class BadRows:
    """Rows of an index: samples whose image or mask is not what it says, and those whose target is not."""

    samples: set[int] = field(default_factory=set)
    targets: set[int] = field(default_factory=set)


def check_places(
    dataset: DatasetIndex,
    index: ShardIndex,
    members: dict[str, dict[str, Place]],
    shard: Shard,
    found: Findings,
) -> BadRows:
    """Compare an index with what its tar holds."""
    bad = BadRows()
    images, target = dataset.members.image, dataset.members.target
    read = {*images, *([target] if dataset.task == "segmentation" else [])}
    places = {
        place[0]: (key, extension, place) for key, row in members.items() for extension, place in row.items()
    }
    unknown = {key: None for key, row in members.items() if not row.keys().isdisjoint(images)}
    offsets, sizes, sums = index.offset.tolist(), index.size.tolist(), index.crc32.tolist()
    for row in range(len(index)):
        key = index.key(row)
        for column, extension in enumerate(index.extensions):
            said = offsets[row][column], sizes[row][column], sums[row][column]
            if not said[0]:
                continue
            there = places.get(said[0])
            if there is not None:
                unknown.pop(there[0], None)
            if (fault := _misplaced(key, extension, said, there)) is not None:
                code, what = fault
                found.add(Finding(code, what, shard.name, key, said[0]))
                if extension in read:
                    bad.samples.add(row)
                if extension == target:
                    bad.targets.add(row)
    if unknown:
        what = f"{len(unknown):,} of the tar's samples are not in the index, this is the first"
        found.add(Finding("not-in-index", what, shard.name, next(iter(unknown))))
    return bad


def _misplaced(
    key: str, extension: str, said: Place, there: tuple[str, str, Place] | None
) -> tuple[str, str] | None:
    """The code of what is wrong with a member that an index names, and what; None where it is there."""
    if there is None:
        return "not-in-tar", f"no member of the tar begins where the index has its .{extension}"
    other, other_extension, place = there
    # An index may put a prefix in front of the keys of a tar, to tell them from those of another one.
    if extension != other_extension or not key.endswith(other):
        return (
            "wrong-place",
            f"the tar holds {f'{other}.{other_extension}'!r} where the index has its .{extension}",
        )
    if place[1] != said[1]:
        return "wrong-place", f"its .{extension} has {place[1]:,} bytes, the index says {said[1]:,}"
    if place[2] != said[2]:
        return "damaged-member", f"its .{extension} is not the {said[1]:,} bytes that were packed (CRC-32)"
    return None
