"""What a cell of a CSV says of a label: 1, 0 or nothing in a column of its own, or the name of a class."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from data_pipeline.csv_table import Faults, Row, shown
from data_pipeline.shard_index import MISSING

LABELS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1} | dict.fromkeys(("", "nan", "na", "-1", "-1.0"), MISSING)
# ASCII digits only: int() also takes '٣', '1_0' and megabytes of digits. pandas writes a column of numbers
# that has gaps with a zero behind each point.
WHOLE = re.compile(r"([0-9]{1,9})(\.0{1,9})?")
NUMBER = re.compile(r"[+-]?[0-9]*\.?[0-9]+([eE][+-]?[0-9]+)?")
LONGEST_CLASS = 200  # letters


class Classes(NamedTuple):
    """The classes by number, and the class number of every text that stands for one."""

    names: tuple[str, ...]
    numbers: dict[str, int]


def label_of(cell: str) -> int | None:
    """1, 0 or MISSING; None where a cell says none of them."""
    return LABELS.get(cell) if cell in LABELS else LABELS.get(cell.strip().lower())


def read_labels(
    row: Row, places: tuple[int, ...], header: tuple[str, ...], faults: Faults
) -> tuple[int, ...]:
    """The labels of a row, one for each of `places`; what is none is a fault."""
    labels = tuple(label_of(row.cells[place]) for place in places)
    for place, label in zip(places, labels, strict=True):
        if label is None:
            what = f"column {header[place]!r}: {shown(row.cells[place])} is neither 1 nor 0"
            mend = (
                "write 1, 0, or nothing, nan, NA or -1 where it is missing; or name other columns: --labels"
            )
            faults.add(row.line, what, mend=mend)
    return tuple(MISSING if label is None else label for label in labels)


def read_class(row: Row, place: int, header: tuple[str, ...], faults: Faults) -> str:
    """The text that stands for the class of a row; none, or one that is too long, is a fault."""
    text = row.cells[place].strip()
    if label_of(text) == MISSING:
        what = f"column {header[place]!r}: no label ({shown(text)})"
        faults.add(row.line, what, mend="give it one, or leave the row out")
    elif len(text) > LONGEST_CLASS:
        what = f"column {header[place]!r}: a label of {len(text):,} letters, {shown(text)}"
        faults.add(row.line, what, mend=f"a class has a name of at most {LONGEST_CLASS} letters")
    return text


def find_classes(texts: Iterable[str], wanted: tuple[str, ...]) -> Classes:
    """The classes of all labels of a column; a text that is missing from `numbers` stands for none.

    `wanted` names them all in order, or names the numbers 0, 1 … Otherwise, where most are whole numbers,
    these are the classes, by size; else the texts are, sorted, without numbers with a sign or a fraction.
    """
    found = Counter(texts)
    whole = {text: int(match[1]) for text in found if (match := WHOLE.fullmatch(text))}
    if wanted:
        numbers = {name: number for number, name in enumerate(wanted)}
        if len(whole) == len(found) and not any(str(value) in numbers for value in whole.values()):
            return Classes(wanted, {text: value for text, value in whole.items() if value < len(wanted)})
        same = {text: numbers[str(value)] for text, value in whole.items() if str(value) in numbers}
        return Classes(wanted, same | numbers)
    if 2 * sum(found[text] for text in whole) > found.total():
        values = sorted(set(whole.values()))
        return Classes(tuple(map(str, values)), {text: values.index(value) for text, value in whole.items()})
    names = sorted(text for text in found if text in whole or not NUMBER.fullmatch(text))
    return Classes(tuple(names), {name: number for number, name in enumerate(names)})


def class_numbers(
    texts: list[str], lines: Iterable[int], column: str, classes: Classes, faults: Faults
) -> list[int]:
    """The class of every text; one that stands for no class is a fault."""
    numbers = [classes.numbers.get(text, MISSING) for text in texts]
    if MISSING in numbers:
        few = ", ".join(classes.names[:10]) + (" …" if len(classes.names) > 10 else "")
        for text, line, number in zip(texts, lines, numbers, strict=True):
            if number == MISSING and label_of(text) != MISSING:
                what = (
                    f"column {column!r}: {shown(text)} is none of the {len(classes.names):,} classes ({few})"
                )
                faults.add(line, what, mend="mend the label, or name all classes: --classes A,B,…")
    return numbers
