"""Writes a table of predictions as CSV, JSONL or Parquet: a part by each process, joined at the end.

The joined file does not depend on how its rows were dealt to the parts.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data_pipeline.fault import UserError
from training.prediction.rows import Cell, Column

GROUP_ROWS = 65_536  # of a row group of Parquet, at most
GROUP_CELLS = 1 << 22  # the same, for wide tables: what a process holds in memory


class Part(Protocol):
    """The file of one process, while rows come."""

    def write(self, rows: Iterable[Sequence[Cell]]) -> None:
        """Append rows."""

    def close(self) -> None:
        """Write what is left."""


class TableFormat(NamedTuple):
    """How a part begins, and how parts become the file."""

    part: Callable[[Path, Sequence[Column]], Part]
    join: Callable[[Sequence[Path], Sequence[Column], Path], None]


class _CsvPart:
    def __init__(self, path: Path, _columns: Sequence[Column]) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        self._plain = csv.writer(self._file, lineterminator="\n")
        # Python before 3.13 leaves a carriage return bare, and then reads it as the end of a row.
        self._quoting = csv.writer(self._file, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def write(self, rows: Iterable[Sequence[Cell]]) -> None:
        for row in rows:
            returns = any(isinstance(cell, str) and "\r" in cell for cell in row)
            (self._quoting if returns else self._plain).writerow(row)

    def close(self) -> None:
        self._file.close()


class _JsonPart:
    def __init__(self, path: Path, columns: Sequence[Column]) -> None:
        self._file = path.open("w", encoding="utf-8", newline="\n")
        self._names = [column.name for column in columns]

    def write(self, rows: Iterable[Sequence[Cell]]) -> None:
        for row in rows:
            record = dict(zip(self._names, row, strict=True))
            self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


class _ParquetPart:
    """Row groups of one size, whatever the portions in which rows come."""

    def __init__(self, path: Path, columns: Sequence[Column]) -> None:
        self._arrow, self._schema = _arrow(), _schema(columns)
        self._writer = import_module("pyarrow.parquet").ParquetWriter(path, self._schema)
        self._group = max(1, min(GROUP_ROWS, GROUP_CELLS // len(columns)))
        self._waiting: list[Any] = []
        self._count = 0

    def write(self, rows: Iterable[Sequence[Cell]]) -> None:
        cells = list(zip(*rows, strict=True))
        if cells:
            arrays = [
                self._arrow.array(column, field.type)
                for column, field in zip(cells, self._schema, strict=True)
            ]
            self.add(self._arrow.RecordBatch.from_arrays(arrays, schema=self._schema))

    def add(self, batch: Any) -> None:
        """Append a pyarrow.RecordBatch."""
        self._waiting.append(batch)
        self._count += batch.num_rows
        while self._count >= self._group:
            self._write_group(self._group)

    def close(self) -> None:
        if self._count:
            self._write_group(self._count)
        self._writer.close()

    def _write_group(self, rows: int) -> None:
        table = self._arrow.Table.from_batches(self._waiting, self._schema)
        self._writer.write_table(table.slice(0, rows).combine_chunks(), row_group_size=rows)
        self._waiting = table.slice(rows).to_batches()
        self._count -= rows


def _join_csv(parts: Sequence[Path], columns: Sequence[Column], path: Path) -> None:
    header = _CsvPart(path, columns)
    header.write([[column.name for column in columns]])
    header.close()
    _append(parts, path)


def _join_jsonl(parts: Sequence[Path], _columns: Sequence[Column], path: Path) -> None:
    path.write_bytes(b"")
    _append(parts, path)


def _append(parts: Sequence[Path], path: Path) -> None:
    with path.open("ab") as file:
        for part in parts:
            with part.open("rb") as content:
                shutil.copyfileobj(content, file, 1 << 20)


def _join_parquet(parts: Sequence[Path], columns: Sequence[Column], path: Path) -> None:
    joined = _ParquetPart(path, columns)
    for part in parts:
        with import_module("pyarrow.parquet").ParquetFile(part) as file:
            for batch in file.iter_batches(batch_size=GROUP_ROWS):
                joined.add(batch)
    joined.close()


def _schema(columns: Sequence[Column]) -> Any:
    arrow = _arrow()
    kinds = {"text": arrow.string(), "number": arrow.float32(), "flag": arrow.int8()}
    return arrow.schema([(column.name, kinds[column.kind]) for column in columns])


def _arrow() -> Any:
    """The pyarrow package; USAGE where it is not installed."""
    try:
        return import_module("pyarrow")
    except ImportError:
        raise UserError(
            "predict.out: to write .parquet takes pyarrow, which is not installed",
            mend="pip install 'lockstep[parquet]', or write .csv or .jsonl",
            code="USAGE",
        ) from None


TABLE_FORMATS: dict[str, TableFormat] = {
    ".csv": TableFormat(_CsvPart, _join_csv),
    ".jsonl": TableFormat(_JsonPart, _join_jsonl),
    ".parquet": TableFormat(_ParquetPart, _join_parquet),
}


def table_format(path: Path) -> TableFormat:
    """The format that a file's name asks for; USAGE for any other, or for one that is not installed."""
    found = TABLE_FORMATS.get(path.suffix.lower())
    if found is None:
        raise UserError(
            f"predict.out: '{path}' is no table that can be written",
            mend=f"give a file that ends in {', '.join(TABLE_FORMATS)}",
            code="USAGE",
        )
    if found is TABLE_FORMATS[".parquet"]:
        _arrow()
    return found
