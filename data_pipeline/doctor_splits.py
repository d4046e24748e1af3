"""What the shards of a split tell together: sums against dataset.json, the balance of classes, sizes.

Shapes: S shards, T samples, C classes or labels, K channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.filesize import decimal

from data_pipeline.doctor_samples import LARGE, THIN, TINY, Moments
from data_pipeline.doctor_shards import Prints, Sums
from data_pipeline.draws import IntArray
from data_pipeline.findings import Finding, Findings
from data_pipeline.index import DatasetIndex, Split

TRAIN = "train"
IMBALANCE = 20  # of the largest class to the smallest
STATISTICS_OFF = 0.05  # of pixels scaled to 0..1
STATISTICS_SAMPLES = 200  # fewer than these, unless they are all, say little about a split
LARGE_SHARD, TINY_SHARD, MANY_SHARDS = 4 << 30, 4 << 20, 100  # bytes, bytes on average, shards
UNEVEN_SHARD = 1 << 28  # bytes from which it matters that one shard holds most of a split
NODE_PROCESSES = 8  # more of them are on several nodes


TRAITS = {
    "progressive": "are progressive JPEGs",
    "large-pictures": f"have a shorter side of more than {LARGE} pixels",
    "thin-pictures": f"are more than {THIN} times as long as wide",
    "tiny-pictures": f"have a shorter side of less than {TINY} pixels",
    "coloured": 'are in colour, in a data set of the mode "L"',
    "all-grey": 'are grey, in a data set of the mode "RGB"',
    "sixteen-bit": "have 16 bits a channel",
    "turned": "carry an EXIF tag that turns them, which is not done",
    "animated": "are animations",
    "one-class-masks": "have a mask of one class only",
}


@dataclass(frozen=True)
class Use:
    """What the data set is for: processes, samples of a global batch, whether it is fetched from a URL."""

    processes: int = 8
    global_batch: int = 1
    remote: bool = False


@dataclass(frozen=True, eq=False)
class SplitReport:
    """A split and the sums over its shards."""

    name: str
    split: Split
    sums: Sums


def check_digest(split: SplitReport, prints: Sequence[Prints], found: Findings) -> None:
    """The digest of all keys, by which an evaluation proves that it saw each once, against dataset.json."""
    digest = sum(int(one.keys.sum(dtype=np.uint64)) for one in prints) % 2**64
    if split.sums.whole and f"{digest:016x}" != split.split.keys_digest:
        what = f"the keys of {split.name} have the digest {digest:016x}"
        found.add(Finding("keys-digest", f"{what}, dataset.json says {split.split.keys_digest}"))


def check_sums(dataset: DatasetIndex, split: SplitReport, found: Findings) -> None:
    """Counts of the classes, mean and deviation against what dataset.json says."""
    if not split.sums.whole:
        return  # the findings about its shards say why
    all_seen = split.sums.seen.samples == split.split.samples
    counts = class_counts(dataset, split)
    if _countable(dataset, split):
        for name, here, said in zip(dataset.classes, counts.tolist(), split.split.class_counts, strict=True):
            if here != said:
                what = f"{split.name} holds {here:,} of class {name!r}, dataset.json says {said:,}"
                found.add(Finding("class-counts", what))
    if split.name == TRAIN and (all_seen or split.sums.seen.samples >= STATISTICS_SAMPLES):
        _check_statistics(dataset, split.sums.seen.moments, found)


def class_counts(dataset: DatasetIndex, split: SplitReport) -> IntArray:
    """int64 [C] as in dataset.json: samples of a class, samples with a 1, or pixels."""
    return (
        split.sums.seen.masked[: len(dataset.classes)]
        if dataset.task == "segmentation"
        else split.sums.labels.ones
    )


def _check_statistics(dataset: DatasetIndex, moments: Moments, found: Findings) -> None:
    if not moments.pixels:
        return
    mean = moments.sums / moments.pixels
    std = np.sqrt(np.maximum(moments.squares / moments.pixels - mean**2, 0))
    for name, said, seen in (("mean", dataset.mean, mean), ("std", dataset.std, std)):
        here = seen[: dataset.channels]
        if np.abs(here - said).max() > STATISTICS_OFF:
            numbers = [" ".join(f"{value:.3f}" for value in values) for values in (said, here)]
            what = f"the {name} is {numbers[0]} in dataset.json, {numbers[1]} of the pixels"
            found.add(Finding("statistics", what))


def check_balance(dataset: DatasetIndex, splits: dict[str, SplitReport], found: Findings) -> None:
    """Classes without samples, labels that nobody gave, and how unlike in size the classes are."""
    train = splits.get(TRAIN)
    if train is None:
        found.add(Finding("no-train-split", f"there is no split {TRAIN!r}, only {', '.join(splits)}"))
        return
    whole = {name: split for name, split in splits.items() if _countable(dataset, split)}
    counted = {name: class_counts(dataset, split) for name, split in whole.items()}
    counts = counted.pop(TRAIN, None)
    if counts is None:
        return
    noun = {"multilabel": "sample with a 1 for", "segmentation": "pixel of"}.get(dataset.task, "sample of")
    for number, name in enumerate(dataset.classes):
        given = int(train.sums.labels.ones[number] + train.sums.labels.zeros[number])
        if dataset.task == "multilabel" and not given:
            found.add(Finding("no-label-given", f"nobody gave the label {name!r} in train"))
        elif not counts[number]:
            there = [f"{split} has {count[number]:,}" for split, count in counted.items() if count[number]]
            what = f"train holds no {noun} {name!r}" + (f", but {', '.join(there)}" if there else "")
            found.add(Finding("class-without-training", what))
        elif dataset.task == "multilabel" and counts[number] == given:
            found.add(Finding("one-sided-label", f"the label {name!r} is 1 wherever it is given in train"))
        for split, count in counted.items():
            if counts[number] and not count[number]:
                found.add(Finding("class-without-validation", f"{split} holds no {noun} {name!r}"))
    if dataset.task == "multiclass" and counts.all() and counts.max() >= IMBALANCE * counts.min():
        large, small = (dataset.classes[int(number)] for number in (counts.argmax(), counts.argmin()))
        ratio = f"{counts.max() / counts.min():.0f} to 1"
        what = f"{counts.max():,} samples of {large!r} in train, {counts.min():,} of {small!r}: {ratio}"
        found.add(Finding("imbalance", what))


def _countable(dataset: DatasetIndex, split: SplitReport) -> bool:
    """Whether it was seen as far as its classes must be to be counted."""
    return split.sums.whole and (
        dataset.task != "segmentation" or split.sums.seen.samples == split.split.samples
    )


def check_sizes(split: SplitReport, use: Use, found: Findings) -> None:
    """Too few samples for a step, shards too large or too small to be shared."""
    samples, shards = split.split.samples, split.split.shards
    if not samples:
        found.add(Finding("empty-split", f"the split {split.name} holds no sample"))
    elif split.name == TRAIN and samples < use.global_batch:
        what = f"train holds {samples:,} samples, a global batch {use.global_batch:,}: not one step"
        found.add(Finding("too-few-samples", what))
    for shard in shards:
        if shard.bytes > LARGE_SHARD:
            found.add(Finding("large-shards", decimal(shard.bytes), shard.name))
    total = sum(shard.bytes for shard in shards)
    if len(shards) >= MANY_SHARDS and total < TINY_SHARD * len(shards):
        what = f"{split.name}: {len(shards):,} shards of {decimal(total // len(shards))} on average"
        found.add(Finding("tiny-shards", what))
    if (use.remote or use.processes > NODE_PROCESSES) and samples:
        largest = max(shards, key=lambda shard: shard.samples)
        if largest.samples * 2 > samples and largest.bytes >= UNEVEN_SHARD:
            what = f"holds {largest.samples:,} of the {samples:,} samples of {split.name}"
            found.add(Finding("uneven-shards", what, largest.name))


def check_traits(split: SplitReport, found: Findings) -> None:
    """One note for whatever many samples of a split have in common, with the first of them."""
    for name, trait in sorted(split.sums.seen.traits.items()):
        if name == "all-grey" and trait.count < split.sums.seen.samples:
            continue
        what = f"{trait.count:,} of {split.sums.seen.samples:,} samples in {split.name} {TRAITS[name]}"
        found.add(Finding(name, what, trait.shard, trait.key, trait.offset))
