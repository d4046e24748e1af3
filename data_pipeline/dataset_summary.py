"""Sums up what came of all tars: dataset.json, and what a user should know of the data set.

Shapes: C classes (multilabel: labels; segmentation: classes of pixels).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.draws import IntArray
from data_pipeline.fault import UserError
from data_pipeline.index import DatasetIndex, Members, Shard, Split
from data_pipeline.items import Source
from data_pipeline.packed_shard import TARGETS
from data_pipeline.pixel_values import PixelClasses, moments, pixel_classes
from data_pipeline.shard_result import ShardResult

FEW_SHARDS, MANY_SAMPLES = 8, 10_000


def summed(source: Source, results: Sequence[ShardResult]) -> DatasetIndex:
    """What dataset.json says; DATA where training would have nothing to learn from.

    `results` are those of all tars, in the order of the tars.
    """
    if not any(result.samples for result in results if result.split == "train"):
        raise UserError(
            "there is no picture in the training split that can be read",
            mend="add pictures, or hold out fewer (--val-fraction)",
        )
    pixels = None
    if source.task == "segmentation":
        found = np.flatnonzero(_total([result.tally.mask_values for result in results])).tolist()
        pixels = pixel_classes(source.classes, found)
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
    mean, std = moments(histogram[: 3 if coloured else 1])
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
