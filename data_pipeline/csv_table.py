"""Reads a CSV as its rows with their line numbers, and gathers what is wrong in them into one error."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from data_pipeline.fault import UserError

DELIMITERS = ",;\t"
PROBED_ROWS = 50
FAULTS_SHOWN = 10
VALUE_SHOWN = 60  # letters of a value in an error


class Row(NamedTuple):
    """The cells of a row, as many as the header has, and the line of the file on which it begins."""

    line: int
    cells: list[str]


@dataclass
class Faults:
    """What is wrong in a CSV: the first few in words, and how many there are."""

    path: Path
    words: list[str] = field(default_factory=list)
    mend: str = ""
    line: int = 0
    count: int = 0

    def add(self, line: int, what: str, *, mend: str) -> None:
        """One more fault; the error says how to mend the first."""
        self.count += 1
        if self.count == 1:
            self.line, self.mend = line, mend
        if self.count <= FAULTS_SHOWN:
            self.words.append(f"'{self.path}' line {line}: {what}")

    def raise_any(self) -> None:
        """DATA where there are any."""
        if not self.count:
            return
        more = self.count - len(self.words)
        words = [*self.words, f"and {more:,} more like these in '{self.path}'"] if more else self.words
        raise UserError("\n".join(words), mend=self.mend, place={"file": str(self.path), "line": self.line})


@dataclass(frozen=True)
class Table:
    """A CSV with a header; it is read again at every pass, so that it may be larger than the memory."""

    path: Path
    delimiter: str
    header: tuple[str, ...]

    def rows(self, faults: Faults) -> Iterator[Row]:
        """The rows behind the header. One of another length is a fault; empty ones are nothing."""
        width = len(self.header)
        for row in islice(_records(self.path, self.delimiter), 1, None):
            cells = row.cells
            if len(cells) > width:
                while len(cells) > width and not cells[-1].strip():
                    cells.pop()
            if len(cells) == width:
                yield row
            else:
                found = f"{len(cells)} values, but the header names {width} columns"
                faults.add(row.line, found, mend="quote values that hold the delimiter, or complete the row")

    def probe(self) -> list[Row]:
        """The first few rows."""
        return list(islice(self.rows(Faults(self.path)), PROBED_ROWS))


def open_table(path: Path) -> Table:
    """Find the delimiter and the header; DATA where it is no CSV with rows.

    The delimiter is the one of , ; and tab that cuts the first rows into most columns, the same for all of
    them; else the one that cuts the header so.
    """
    if not path.is_file():
        raise UserError(f"no file '{path}'", mend="give the CSV that names the pictures and their labels")
    delimiter = max(DELIMITERS, key=lambda one: _columns(path, one))
    first = next(_records(path, delimiter), None)
    if first is None:
        raise UserError(f"'{path}' is empty", mend="give a CSV with a header and a row for each picture")
    header = tuple(cell.strip() for cell in first.cells)
    return Table(path, delimiter, header)


def shown(value: str) -> str:
    """A value as it appears in an error, on one line."""
    return repr(value if len(value) <= VALUE_SHOWN else f"{value[:VALUE_SHOWN]}…")


def _columns(path: Path, delimiter: str) -> tuple[int, int]:
    """How many columns a delimiter makes of all of the first rows, 0 where they differ; and of the header."""
    widths = []
    try:
        for row in islice(_records(path, delimiter), PROBED_ROWS):
            widths.append(len(row.cells))
    except UserError:
        widths.append(0)  # broken quotes or bytes: whoever reads the rows says where
    regular = len(set(widths)) == 1 and widths[0] > 1
    return (widths[0] if regular else 0), (widths[0] if widths else 0)


def _records(path: Path, delimiter: str) -> Iterator[Row]:
    """Every record that holds anything, the header too; DATA where quotes or bytes are broken.

    Strict: a quote that is never closed would otherwise swallow the rest of the file without a word.
    """
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for cells in reader:
                if any(cells):
                    yield Row(line, cells)
                line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"'{path}' line {line}: {error}",
            mend="close every quote, and double those inside a quoted value",
            place={"file": str(path), "line": line},
        ) from None
    except UnicodeDecodeError:
        line = _line_not_utf8(path)
        raise UserError(
            f"'{path}' line {line} is not UTF-8",
            mend='save it as "CSV UTF-8"',
            place={"file": str(path), "line": line},
        ) from None
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}", mend="make it readable") from None


def _line_not_utf8(path: Path) -> int:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                raw.decode()
            except UnicodeDecodeError:
                return number
    return 0
