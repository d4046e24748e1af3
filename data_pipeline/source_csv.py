"""A CSV that names pictures and their labels: one column of classes, or several of 0 and 1."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_pipeline.csv_columns import Columns, find_columns
from data_pipeline.csv_labels import class_numbers, find_classes, read_class, read_labels
from data_pipeline.csv_pictures import CsvPictures
from data_pipeline.csv_table import Faults, Row, Table, open_table, shown
from data_pipeline.fault import UserError
from data_pipeline.items import Found, Source, SourceOptions, keyed
from data_pipeline.picture_files import SPLIT_NAMES
from data_pipeline.splitting import Labels, held_out


@dataclass
class Rows:
    """What is used of a CSV, column by column, so that ten million rows are a few long lists.

    `texts` are the labels of one column of classes, `vectors` those of several columns of 1, 0 and -1; lists
    of what no column tells stay empty.
    """

    lines: array[int] = field(default_factory=lambda: array("q"))
    pictures: list[str] = field(default_factory=list)  # relative to their folder
    texts: list[str] = field(default_factory=list)
    vectors: list[tuple[int, ...]] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)


def find_csv(path: Path, options: SourceOptions) -> Source:
    """The pictures that a CSV names; DATA lists the rows that are wrong, UNSAFE a path out of their folder.

    Without a column of splits the samples are divided by ratio and seed, stratified by class or label; the
    pictures of one group always stay together. The order of the rows changes nothing.
    """
    table = open_table(path)
    pictures = CsvPictures(options.images or path.parent)
    columns = find_columns(table, pictures, options)
    faults = Faults(path)
    rows = _read(table, columns, pictures, faults)
    order = sorted(range(len(rows.pictures)), key=rows.pictures.__getitem__)
    _check_once(rows, order, faults)
    if columns.split is not None and columns.group is not None:
        _check_groups(rows, table.header[columns.group], faults)
    classes: tuple[str, ...] = tuple(table.header[place] for place in columns.labels)
    targets: Sequence[int] | Sequence[tuple[int, ...]] = rows.vectors
    if columns.one_label:
        found = find_classes(rows.texts, options.classes)
        targets = class_numbers(rows.texts, rows.lines, classes[0], found, faults)
        classes = found.names
    faults.raise_any()
    if not order:
        raise UserError(f"'{path}' has no rows", mend="give a CSV with a header and a row for each picture")
    splits = rows.splits or _splits(rows, order, targets, options)
    found_items = (
        Found(f"{pictures.folder}/{rows.pictures[row]}", rows.pictures[row], splits[row], targets[row])
        for row in order
    )
    task = "multiclass" if columns.one_label else "multilabel"
    return Source(task, classes, keyed(found_items), _in_words(table, columns, options))


def _read(table: Table, columns: Columns, pictures: CsvPictures, faults: Faults) -> Rows:
    rows, header = Rows(), table.header
    # One object for all rows that say the same.
    words: dict[str, str] = {}
    vectors: dict[tuple[int, ...], tuple[int, ...]] = {}
    for row in table.rows(faults):
        rows.lines.append(row.line)
        rows.pictures.append(_picture(row, columns.image, pictures, faults))
        if columns.one_label:
            text = read_class(row, columns.labels[0], header, faults)
            rows.texts.append(words.setdefault(text, text))
        else:
            vector = read_labels(row, columns.labels, header, faults)
            rows.vectors.append(vectors.setdefault(vector, vector))
        if columns.split is not None:
            rows.splits.append(_split(row, columns.split, header, faults))
        if columns.group is not None:
            group = row.cells[columns.group].strip()
            if not group:
                what = f"column {header[columns.group]!r}: no group"
                faults.add(row.line, what, mend="give it one; or use no groups: --group-column ''")
            rows.groups.append(words.setdefault(group, group))
    return rows


def _picture(row: Row, place: int, pictures: CsvPictures, faults: Faults) -> str:
    value = row.cells[place].strip()
    if not pictures.inside(value):
        raise UserError(
            f"'{faults.path}' line {row.line}: {shown(value)} leads out of the folder '{pictures.folder}'",
            mend="name pictures below one folder, and give that folder: --images",
            code="UNSAFE",
            place={"file": str(faults.path), "line": row.line},
        )
    try:
        return pictures.find(value)
    except LookupError as error:
        faults.add(
            row.line, str(error.args[0]), mend="give the folder of the pictures (--images), or drop the row"
        )
        return ""


def _split(row: Row, place: int, header: tuple[str, ...], faults: Faults) -> str:
    value = row.cells[place].strip()
    if value.lower() not in SPLIT_NAMES:
        what = f"column {header[place]!r}: {shown(value)} is no split ({', '.join(SPLIT_NAMES)})"
        faults.add(row.line, what, mend="name a split; or divide by ratio instead: --split-column ''")
    return SPLIT_NAMES.get(value.lower(), "")


def _check_once(rows: Rows, order: list[int], faults: Faults) -> None:
    for one, other in pairwise(order):
        name = rows.pictures[one]
        if name and name == rows.pictures[other]:
            first, second = sorted((rows.lines[one], rows.lines[other]))
            faults.add(
                second, f"{shown(name)} is there already, in line {first}", mend="keep one row a picture"
            )


def _check_groups(rows: Rows, column: str, faults: Faults) -> None:
    """Once for each group that is in two splits: what a model learned of a patient would pass for skill."""
    first: dict[str, int] = {}
    told: set[str] = set()
    for row, (group, split) in enumerate(zip(rows.groups, rows.splits, strict=True)):
        before = first.setdefault(group, row)
        if rows.splits[before] != split and group and group not in told:
            told.add(group)
            there = f"{rows.splits[before]} in line {rows.lines[before]}"
            what = f"column {column!r}: {shown(group)} is in {split}, but was in {there}"
            faults.add(rows.lines[row], what, mend="put all pictures of a group into one split")


def _splits(
    rows: Rows, order: list[int], targets: Sequence[int] | Sequence[tuple[int, ...]], options: SourceOptions
) -> list[str]:
    """Of every row, by ratio; drawn in the order of the pictures' names."""
    labels: Labels = np.array([targets[row] for row in order], np.int8 if rows.vectors else np.int64)
    groups = None
    if rows.groups:
        numbers = {group: number for number, group in enumerate(sorted(set(rows.groups)))}
        groups = np.array([numbers[rows.groups[row]] for row in order], np.int64)
    splits = ["train"] * len(order)
    drawn = held_out(labels, groups, val_fraction=options.val_fraction, seed=options.seed)
    for row in np.flatnonzero(drawn).tolist():
        splits[order[row]] = "val"
    return splits


def _in_words(table: Table, columns: Columns, options: SourceOptions) -> str:
    """What was found, for the user to see whether it is what was meant."""
    named = [repr(table.header[place]) for place in columns.labels]
    words = f"a CSV, pictures by column {table.header[columns.image]!r}, "
    words += f"class by column {named[0]}" if columns.one_label else f"labels by columns {', '.join(named)}"
    kind = "class" if columns.one_label else "label"
    if columns.split is not None:
        words += f", splits by column {table.header[columns.split]!r}"
    else:
        words += f", {100 * options.val_fraction:g}% of each {kind} held out for val"
    if columns.group is not None:
        words += f", groups by column {table.header[columns.group]!r}"
    return words
