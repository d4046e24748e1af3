"""Checks the labels of one shard: in range, and the same in the index as in the tar's own members.

Shapes: R rows (samples) of the shard, C classes or labels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.draws import IntArray
from data_pipeline.findings import Finding, Findings
from data_pipeline.index import DatasetIndex, Shard
from data_pipeline.shard_index import MISSING, ShardIndex
from data_pipeline.targets import MAX_MEMBER, NUMBER, json_record, label

Label = int | tuple[int, ...]  # class number; 1, 0 or -1 for each label


@dataclass(frozen=True, eq=False)
class LabelCounts:
    """Samples of each class or with a 1 for each label, and samples with a 0 for each label; int64 [C]."""

    ones: IntArray
    zeros: IntArray

    def __add__(self, other: LabelCounts) -> LabelCounts:
        return LabelCounts(self.ones + other.ones, self.zeros + other.zeros)


def no_labels(dataset: DatasetIndex) -> LabelCounts:
    """The counts of no sample."""
    return LabelCounts(*np.zeros((2, len(dataset.classes)), np.int64))


def check_labels(
    dataset: DatasetIndex,
    index: ShardIndex,
    shard: Shard,
    tar: Path | None,
    found: Findings,
    *,
    known: set[int],
) -> LabelCounts | None:
    """Count the labels of a shard and name the wrong ones; None where the index has another kind.

    Members of the rows that are `known` to be damaged are not looked into.
    """
    classes, labels = len(dataset.classes), index.labels
    shapes = {"multiclass": (len(index),), "multilabel": (len(index), classes)}
    if labels.shape != shapes.get(dataset.task, (len(index), 0)):
        what = f"its index holds labels of the shape {list(labels.shape)}, which do not fit {dataset.task}"
        found.add(Finding("labels-column", what, shard.name))
        return None
    if dataset.task == "segmentation":
        return no_labels(dataset)
    least, most = (0, classes - 1) if dataset.task == "multiclass" else (MISSING, 1)
    wrong = (labels < least) | (labels > most)
    wrong_rows = np.flatnonzero(wrong if labels.ndim == 1 else wrong.any(axis=1)).tolist()
    for row in wrong_rows:
        what = f"the label {np.extract(wrong[row], labels[row])[0]}, allowed are {least} to {most}"
        found.add(Finding("label-range", what, shard.name, index.key(row)))
    if tar is not None:
        _compare(dataset, index, shard, tar, found, known={*known, *wrong_rows})
    if labels.ndim == 1:
        counts = np.bincount(labels[~wrong], minlength=classes)
        return LabelCounts(counts.astype(np.int64), np.zeros(classes, np.int64))
    return LabelCounts((labels == 1).sum(axis=0), (labels == 0).sum(axis=0))


def _compare(
    dataset: DatasetIndex,
    index: ShardIndex,
    shard: Shard,
    tar: Path,
    found: Findings,
    *,
    known: set[int],
) -> None:
    """Labels in the index against the members they were made of, but for the rows `known` to be wrong."""
    target, numbers = dataset.members.target, {name: number for number, name in enumerate(dataset.classes)}
    descriptor = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for row in range(len(index)):
            column = index.column((target,), row)
            if column is None or row in known:
                continue
            offset, size = int(index.offset[row, column]), int(index.size[row, column])
            data = os.pread(descriptor, min(size, MAX_MEMBER), offset)
            said = tuple(index.labels[row].tolist()) if index.labels.ndim == 2 else int(index.labels[row])
            if said not in (readings := member_labels(data, target, numbers, labels=index.labels.ndim == 2)):
                what = f"its .{target} {_difference(readings, said, data, dataset)}"
                found.add(Finding("label-differs", what, shard.name, index.key(row), offset))
    finally:
        os.close(descriptor)


def member_labels(data: bytes, extension: str, numbers: dict[str, int], *, labels: bool) -> list[Label]:
    """Everything that a member may say of a sample's label; which of its fields is meant is not written down.

    `numbers` are those of the classes or labels by their names; `labels` whether there are several a sample.
    """
    if extension.rpartition(".")[2].lower() != "json":
        text = data.decode("utf-8", "replace").strip()
        return [] if labels else _classes([text], numbers)
    try:
        record = json_record(data)
    except ValueError:
        return []
    if not labels:
        values = [value for value in record.values() if isinstance(value, int | str)]
        return _classes(list(map(str, values)), numbers)
    found: list[Label] = []
    fields = [one for one in record.values() if isinstance(one, dict)]
    fields += [dict(zip(numbers, one, strict=False)) for one in record.values() if isinstance(one, list)]
    for field in (*fields, record):
        if not numbers.keys().isdisjoint(field):
            try:
                found.append(tuple(label(name, field.get(name)) for name in numbers))
            except ValueError:
                continue
    return found


def _classes(texts: list[str], numbers: dict[str, int]) -> list[Label]:
    """The classes that these texts name, or whose numbers they are."""
    found: list[Label] = [numbers[text] for text in texts if text in numbers]
    found += [int(text) for text in texts if NUMBER.fullmatch(text) and int(text) < len(numbers)]
    return found


def _difference(readings: list[Label], said: Label, data: bytes, dataset: DatasetIndex) -> str:
    """In words, what a member says instead of what the index says."""
    if not readings:
        return f"holds no label of this data set: {data[:40].decode('utf-8', 'backslashreplace')!r}"
    first = readings[0]
    if isinstance(first, int) or isinstance(said, int):
        return f"says {first}, the index {said}"
    pairs = zip(dataset.classes, first, said, strict=True)
    name, here, there = next(pair for pair in pairs if pair[1] != pair[2])
    return f"says {here} for {name!r}, the index {there}"
