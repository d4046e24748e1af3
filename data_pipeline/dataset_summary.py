"""Sums up what came of all tars: dataset.json, and what a user should know of the data set.

Shapes: C classes (multilabel: labels; segmentation: classes of pixels).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.draws import IntArray
from data_pipeline.fault import UserError
from data_pipeline.index import DatasetIndex, Members, Shard, Split
from data_pipeline.items import Source
from data_pipeline.masks import IGNORED
from data_pipeline.packed_shard import TARGETS
from data_pipeline.shard_result import ShardResult

MASK_CLASSES = 254  # numbers 0..253: 254 stands for "unknown", 255 for "ignored"
TWO_VALUES = ((0, 255), (0, 1))
FEW_SHARDS, MANY_SAMPLES = 8, 10_000


class PixelClasses(NamedTuple):
    """The classes of a segmentation, and the value of each in the masks."""

    names: tuple[str, ...]
    values: tuple[int, ...]


def summed(source: Source, results: Sequence[ShardResult]) -> DatasetIndex:
    """What dataset.json says; DATA where training would have nothing to learn from.

    `results` are those of all tars, in the order of the tars.
    """
    if not any(result.samples for result in results if result.split == "train"):
        raise UserError(
            "there is no picture in the training split that can be read",
            mend="add pictures, or hold out fewer (--val-fraction)",
        )
    pixels = _pixel_classes(source.classes, results) if source.task == "segmentation" else None
    classes = pixels.names if pixels else source.classes
    splits: dict[str, Split] = {}
    for name in dict.fromkeys(result.split for result in results if result.samples):
        members = [result for result in results if result.split == name and result.samples]
        counts = _total([_counts(result, pixels) for result in members])
        digest = sum(result.tally.keys_digest for result in members) % 2**64
        splits[name] = Split(tuple(map(_shard, members)), tuple(counts.tolist()), f"{digest:016x}")
    if source.task == "multiclass" and (unseen := _unseen(classes, splits)):
        raise UserError(
            f"class {unseen[0]!r} has no picture in the training split that can be read",
            mend="add pictures to it, hold out fewer (--val-fraction), or remove the class",
        )
    coloured = any(result.tally.coloured for result in results)
    histogram = _total([result.tally.histogram for result in results if result.split == "train"])
    mean, std = _moments(histogram[: 3 if coloured else 1])
    return DatasetIndex(
        source.task,
        classes,
        "RGB" if coloured else "L",
        mean,
        std,
        splits,
        Members(target=TARGETS[source.task]),
        pixels.values if pixels else (),
    )


def remarks(dataset: DatasetIndex, results: Sequence[ShardResult]) -> list[str]:
    """What a user should know, a line each."""
    lines = []
    samples = sum(split.samples for split in dataset.splits.values())
    if missing := sum(result.tally.missing for result in results):
        labels = samples * len(dataset.classes)
        lines.append(f"{missing:,} of {labels:,} labels are missing, and stay so: they count in no loss")
    if dataset.task != "multiclass" and (unseen := _unseen(dataset.classes, dataset.splits)):
        what = "pixel" if dataset.task == "segmentation" else "sample"
        named = ", ".join(map(repr, unseen[:3])) + (f" and {len(unseen) - 3:,} more" if unseen[3:] else "")
        lines.append(f"warning: the training split has no {what} of {named}: nobody can learn that")
        if dataset.task == "segmentation" and 2 * len(unseen) > len(dataset.classes) > 2:
            lines.append(
                f"warning: the masks are taken for class numbers from 0 to {len(dataset.classes) - 1}: "
                "if they are grey levels, save them as class numbers and pack again"
            )
    if progressive := sum(result.tally.progressive for result in results):
        lines.append(
            f"warning: {progressive:,} JPEGs are progressive, 2.8x slower to decode: "
            "pack again with --reencode"
        )
    for name, split in dataset.splits.items():
        if split.samples > MANY_SAMPLES and len(split.shards) < FEW_SHARDS:
            lines.append(
                f"warning: {name} has {split.samples:,} samples in {len(split.shards)} shards: "
                f"{FEW_SHARDS} or more mix and stream better: pack again with a smaller --shard-samples"
            )
    return lines


def _pixel_classes(named: tuple[str, ...], results: Sequence[ShardResult]) -> PixelClasses:
    """Which values of the masks are which classes. 0 and 255, or 0 and 1, are background and foreground."""
    found = np.flatnonzero(_total([result.tally.mask_values for result in results])).tolist()
    for values in TWO_VALUES:
        if set(found) <= set(values) and len(named) in (0, 2):
            return PixelClasses(named or ("background", "foreground"), values)
    highest = max((value for value in found if value != IGNORED), default=0)
    if highest >= MASK_CLASSES:
        raise UserError(
            f"the masks hold {len(found)} different values, up to {highest}: more than {MASK_CLASSES} "
            "classes, or no masks at all",
            mend="save masks with 0 and 255 only, or as class numbers from 0 (255: ignored), as PNG, never "
            "resized with interpolation",
        )
    if named and (highest >= len(named) or set(found) == {0, IGNORED}):
        raise UserError(
            f"{len(named)} classes are named, but the masks hold the values {_listed(found)}",
            mend=f"name as many classes as there are (--classes), or save masks as class numbers from 0 to "
            f"{len(named) - 1} (255: ignored)",
        )
    numbers = range(len(named) or highest + 1)
    return PixelClasses(named or tuple(map(str, numbers)), tuple(numbers))


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (f" … {values[-1]}" if len(values) > 8 else "")


def _counts(result: ShardResult, pixels: PixelClasses | None) -> list[int]:
    if pixels is None:
        return result.tally.class_counts
    return [result.tally.mask_values[value] for value in pixels.values]


def _unseen(classes: tuple[str, ...], splits: dict[str, Split]) -> list[str]:
    return [name for name, count in zip(classes, splits["train"].class_counts, strict=True) if count == 0]


def _shard(result: ShardResult) -> Shard:
    return Shard(result.name, result.samples, result.bytes, result.sha256, result.index_sha256)


def _total(counts: Sequence[Sequence[int] | Sequence[Sequence[int]]]) -> IntArray:
    """The sum of arrays of one shape, exact."""
    total: IntArray = np.array(counts, np.int64).sum(axis=0)
    return total


def _moments(histogram: NDArray[np.int64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel of pixel values scaled to 0..1, from exact counts."""
    values = np.arange(256) / 255
    weights = histogram / histogram.sum(axis=1, keepdims=True)
    mean = weights @ values
    std = np.sqrt(np.maximum(weights @ values**2 - mean**2, 0))
    return tuple(np.round(mean, 6).tolist()), tuple(np.round(np.maximum(std, 1e-3), 6).tolist())
