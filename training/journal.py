"""Writes metrics.jsonl, append-only, one record a line; and hands the same numbers to the trackers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

METRICS_FILE = "metrics.jsonl"


class Journal:
    """The records of one run. `committed` bytes of the file belong to the checkpoint that is resumed from.

    What lies behind them will be written again, so it is cut off: no gap, no duplicate.
    """

    def __init__(self, run_dir: Path, *, active: bool, committed: int) -> None:
        self._file: IO[bytes] | None = None
        if active:
            self._file = (run_dir / METRICS_FILE).open("ab")
            self._file.truncate(committed)
            self._file.seek(committed)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one record."""
        if self._file is not None:
            line = json.dumps({"kind": kind, **fields}, ensure_ascii=False)
            self._file.write(line.encode() + b"\n")
            self._file.flush()

    def commit(self) -> int:
        """Push everything to the disk; the length in bytes."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records of a run; a last line that a kill cut short is not one."""
    records = []
    for line in (run_dir / METRICS_FILE).read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            records.append(json.loads(line))
    return records
