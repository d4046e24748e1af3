"""Says in text what a data set holds: a table of its classes by split, and what the table leaves out."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.table import Table

from data_pipeline.command_line import shards_in_words
from data_pipeline.draws import IntArray
from data_pipeline.index import DatasetIndex

CLASS_ROWS = 30
MODES = {"L": "grey (L)", "RGB": "colour (RGB)"}
FIRST = {"multiclass": "class", "multilabel": "label (samples with a 1)", "segmentation": "class (of pixels)"}


def class_table(dataset: DatasetIndex) -> Table:
    """What there is of each class in each split, the first CLASS_ROWS classes, and the totals.

    Samples of a class (multiclass), samples that have a label (multilabel: they may have several, so the last
    line is the samples), or pixels in percent of those that have a class (segmentation).
    """
    counts = np.array([split.class_counts for split in dataset.splits.values()], np.int64).T
    counts = np.concatenate([counts, counts.sum(axis=1, keepdims=True)], axis=1)
    rows, footer = _cells(dataset, counts)
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    table.add_column(FIRST[dataset.task], footer[0], overflow="ellipsis", no_wrap=True, max_width=48)
    for place, name in enumerate([*dataset.splits, "total"]):
        widest = max(len(name), *(len(cells[place]) for cells in (*rows, footer[1])))
        table.add_column(name, footer[1][place], justify="right", no_wrap=True, min_width=widest)
    for name, cells in zip(dataset.classes[:CLASS_ROWS], rows, strict=False):
        table.add_row(" ".join(name.split()), *cells)
    if (more := len(dataset.classes) - CLASS_ROWS) > 0:
        table.add_row(f"... and {more:,} more classes", *rows[CLASS_ROWS])
    return table


def _cells(dataset: DatasetIndex, counts: IntArray) -> tuple[list[list[str]], tuple[str, list[str]]]:
    """The rows of the first classes and one of all others, and the last line with its name."""
    shown = counts[:CLASS_ROWS]
    if len(counts) > CLASS_ROWS:
        shown = np.concatenate([shown, counts[CLASS_ROWS:].sum(axis=0, keepdims=True)])
    if dataset.task == "segmentation":
        totals = np.maximum(counts.sum(axis=0), 1)
        return [[f"{share:.2%}" for share in row / totals] for row in shown], ("samples", _samples(dataset))
    plain = [[f"{count:,}" for count in row.tolist()] for row in shown]
    if dataset.task == "multilabel":
        return plain, ("samples", _samples(dataset))
    return plain, ("total", [f"{count:,}" for count in counts.sum(axis=0).tolist()])


def _samples(dataset: DatasetIndex) -> list[str]:
    samples = [split.samples for split in dataset.splits.values()]
    return [f"{count:,}" for count in (*samples, sum(samples))]


def facts(dataset: DatasetIndex) -> list[str]:
    """What the table leaves out: the pictures' mode and statistics, masks' values, the tars of each split."""
    mean, std = (" ".join(f"{value:.3f}" for value in values) for values in (dataset.mean, dataset.std))
    lines = [f"pictures: {MODES[dataset.image_mode]}, mean {mean}, std {std}"]
    if dataset.mask_values:
        lines.append(f"masks: the values {_values(dataset.mask_values)} are the classes")
    if dataset.tars:
        lines.append(f"the tars lie in {dataset.tars}")
    return [*lines, *(f"{name}: {shards_in_words(split)}" for name, split in dataset.splits.items())]


def _values(values: tuple[int, ...]) -> str:
    if len(values) > 3 and values == tuple(range(len(values))):
        return f"0 to {values[-1]}"
    return ", ".join(map(str, values))
