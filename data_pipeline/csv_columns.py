"""Finds out which column of a CSV names the picture, which the labels, the split and the group."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import NamedTuple

from data_pipeline.csv_labels import label_of
from data_pipeline.csv_pictures import CsvPictures
from data_pipeline.csv_table import Faults, Table, shown
from data_pipeline.fault import UserError
from data_pipeline.items import SourceOptions
from data_pipeline.picture_files import PICTURE_EXTENSIONS
from data_pipeline.shard_index import MISSING

# By name, the likeliest first; compared in lower case with everything but letters and digits as "_".
IMAGE_NAMES = (
    *("image", "images", "image_path", "path", "file", "filename", "file_name", "filepath", "file_path"),
    *("image_file", "image_name", "image_index", "img", "img_path", "img_name", "picture", "photo"),
    *("image_id", "imageid", "id"),
)
LABEL_NAMES = (
    *("label", "labels", "class", "classes", "class_name", "target", "category", "diagnosis", "dx"),
    *("label_name", "class_id", "class_label", "label_id"),
)
SPLIT_NAMES = ("split",)
GROUP_NAMES = (
    *("group", "group_id", "patient", "patient_id", "patientid", "patient_number"),
    *("subject", "subject_id", "subjectid"),
)


class Columns(NamedTuple):
    """Positions of columns. One label column holds class names or numbers, several hold 0, 1 or nothing."""

    image: int
    labels: tuple[int, ...]
    split: int | None
    group: int | None

    @property
    def one_label(self) -> bool:
        """Whether a sample has one label, its class."""
        return len(self.labels) == 1


def find_columns(table: Table, pictures: CsvPictures, options: SourceOptions) -> Columns:
    """As the options name them, else as names or values tell; USAGE or DATA where nothing does."""
    split = _optional(table, options.split_column, SPLIT_NAMES, "--split-column")
    group = _optional(table, options.group_column, GROUP_NAMES, "--group-column")
    taken = {column for column in (split, group) if column is not None}
    labels = tuple(_named(table, name, "--labels") for name in options.label_columns)
    image = _image_column(table, pictures, options, taken | set(labels))
    labels = labels or _label_columns(table, taken | {image})
    used = [image, *labels, *taken]
    names = [table.header[place] for place in used]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(
            f"column {twice!r} of '{table.path}' is to be two things at once, or is there twice",
            mend="name another column for each of the options that name one",
            code="USAGE",
        )
    if options.classes and len(labels) > 1:
        labels = _ordered(table, labels, options.classes)
    return Columns(image, labels, split, group)


def _ordered(table: Table, labels: tuple[int, ...], wanted: tuple[str, ...]) -> tuple[int, ...]:
    places = {table.header[place]: place for place in labels}
    if places.keys() != set(wanted):
        raise UserError(
            f"--classes names {', '.join(wanted)}, but the labels of '{table.path}' are {', '.join(places)}",
            mend="name all columns of labels in the order that they should have, or leave --classes out",
            code="USAGE",
        )
    return tuple(places[name] for name in wanted)


def _optional(table: Table, wanted: str | None, names: tuple[str, ...], option: str) -> int | None:
    """The column that an option names, else one by its name, else none."""
    if wanted == "":
        return None
    return _named(table, wanted, option) if wanted else next(iter(_by_name(table, names)), None)


def _named(table: Table, name: str, option: str) -> int:
    places = [place for place, column in enumerate(table.header) if column == name.strip()]
    if len(places) != 1:
        found = "no column" if not places else f"{len(places)} columns"
        raise UserError(
            f"{option} names {shown(name)}, but '{table.path}' has {found} of that name",
            mend=f"its columns are: {', '.join(table.header)}",
            code="USAGE",
        )
    return places[0]


def _by_name(table: Table, names: tuple[str, ...]) -> list[int]:
    """The columns that are called by one of these names, in the order of the names."""
    plain = [re.sub("[^a-z0-9]+", "_", column.lower()).strip("_") for column in table.header]
    return [place for name in names for place, column in enumerate(plain) if column == name]


def _image_column(table: Table, pictures: CsvPictures, options: SourceOptions, taken: set[int]) -> int:
    if options.image_column:
        column = _named(table, options.image_column, "--image-column")
    else:
        found = likely_image_column(table, pictures.holds, taken=taken)
        if found is None:
            raise UserError(
                f"no column of '{table.path}' names pictures in '{pictures.folder}'",
                mend="name the folder (--images) or the column (--image-column); "
                f"the columns are: {', '.join(table.header)}",
            )
        column = found
    check_header(table, column)
    return column


def check_header(table: Table, column: int) -> None:
    """DATA where the name of the column of pictures is itself a picture's: there is no header."""
    if table.header[column].lower().endswith(PICTURE_EXTENSIONS):
        raise UserError(
            f"'{table.path}' has no header: its first line names a picture, {shown(table.header[column])}",
            mend="put a line with the names of the columns before it, such as image,label",
            place={"file": str(table.path), "line": 1},
        )


def likely_image_column(
    table: Table, holds: Callable[[str], bool], *, taken: Collection[int] = ()
) -> int | None:
    """The column of a known name whose first cells name most pictures, else any of which at least half do.

    `holds` tells whether a cell names a picture. DATA where the table has no rows.
    """
    rows = table.probe()
    if not rows:
        raise UserError(
            f"'{table.path}' has no rows", mend="give a CSV with a header and a row for each picture"
        )
    hits = [sum(holds(row.cells[place].strip()) for row in rows) for place in range(len(table.header))]
    named = [place for place in _by_name(table, IMAGE_NAMES) if place not in taken]
    found = [place for place in range(len(hits)) if place not in taken and 2 * hits[place] >= len(rows)]
    if any(hits[place] for place in named) or (named and not found):
        return max(named, key=lambda place: hits[place])
    return max(found, key=lambda place: hits[place], default=None)


def _label_columns(table: Table, taken: set[int]) -> tuple[int, ...]:
    """One by its name; else all that hold 0, 1 or nothing in most rows; else the only one that is left."""
    if named := [place for place in _by_name(table, LABEL_NAMES) if place not in taken]:
        return (named[0],)
    free = [place for place, name in enumerate(table.header) if name and place not in taken]
    given, missing, rows = [0] * len(table.header), [0] * len(table.header), 0
    for row in table.rows(Faults(table.path)):
        rows += 1
        for place in free:
            label = label_of(row.cells[place])
            if label == MISSING:
                missing[place] += 1
            elif label is not None:
                given[place] += 1
    labels = [place for place in free if given[place] and 2 * (given[place] + missing[place]) > rows]
    if labels or len(free) == 1:
        return tuple(labels or free)
    raise UserError(
        f"no column of '{table.path}' is known to be the label",
        mend=f"name it, or several that hold 0 and 1: --labels; the columns are: {', '.join(table.header)}",
    )
