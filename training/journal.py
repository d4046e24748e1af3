"""Writes metrics.jsonl, append-only, one record a line.

On a disk that is full, records wait in memory and are written later, in their order: no gap, no torn line.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.disk import fsync_file, push, write_all

METRICS_FILE = "metrics.jsonl"


class Journal:
    """The records of one run. `committed` bytes of the file belong to the checkpoint that is resumed from.

    What lies behind them will be written again, so it is cut off: no gap, no duplicate. `warn` hears, once
    each time, that records have to wait and that they no longer do.

    The process that trains appends, and a thread pushes to the disk what a checkpoint counts on.
    """

    def __init__(
        self, run_dir: Path, *, active: bool, committed: int, warn: Callable[[str], None] = print
    ) -> None:
        self._path, self._warn = run_dir / METRICS_FILE, warn
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._synced = committed  # bytes that the disk has for sure
        self._unsynced: list[bytes] = []  # records behind them that the file has
        self._waiting: list[bytes] = []  # records behind those, which it does not have yet
        self._torn = False  # whether the file may hold more than the records that it has
        if active:
            self._descriptor = self._open()
            there = os.fstat(self._descriptor).st_size
            if there < committed:
                warn(f"'{self._path}' has lost its last {committed - there} bytes: its records have a gap")
                self._synced = there
            os.ftruncate(self._descriptor, self._synced)
            fsync_file(run_dir)  # a power cut must not take the file out of its folder

    def write(self, kind: str, **fields: Any) -> None:
        """Append one record, now or, where the disk refuses it, when it no longer does."""
        if self._descriptor is None:
            return
        line = json.dumps({"kind": kind, **fields}, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            waited = bool(self._waiting)
            self._waiting.append(line)
            try:
                self._append()
            except OSError as error:
                if not waited:
                    self._warn(f"{error.filename}: {error.strerror}; records wait until it can be written")

    @property
    def length(self) -> int:
        """Bytes of all records, those that wait included."""
        with self._lock:
            return self._synced + sum(map(len, self._unsynced)) + sum(map(len, self._waiting))

    def commit(self) -> int:
        """Push all records to the disk; the length in bytes. OSError where that cannot be."""
        if self._descriptor is None:
            return 0
        with self._lock:
            self._append()
            descriptor, records = self._descriptor, list(self._unsynced)
        try:
            push(descriptor)
        except OSError as error:
            self._begin_again()
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        with self._lock:
            self._synced += sum(map(len, records))
            del self._unsynced[: len(records)]
            return self._synced

    def _open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def _append(self) -> None:
        """Write what waits, all of it or nothing; OSError with the file's name."""
        assert self._descriptor is not None
        waiting = self._waiting
        try:
            if self._torn:
                os.ftruncate(self._descriptor, self._synced + sum(map(len, self._unsynced)))
            self._torn = True
            write_all(self._descriptor, b"".join(waiting))
            self._torn = False
        except OSError as error:
            self._cut()
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        self._unsynced += waiting
        self._waiting = []
        if len(waiting) > 1:
            self._warn(f"{self._path}: the records that waited are written")

    def _cut(self) -> None:
        """Take back what was written of a line; where even that fails, it is tried again before the next."""
        assert self._descriptor is not None
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, self._synced + sum(map(len, self._unsynced)))
            self._torn = False

    def _begin_again(self) -> None:
        """After a failed push nobody knows what the disk has of it, and another one would not tell either.

        So the file is opened anew, cut back to what the disk has for sure, and written again from there.
        """
        with self._lock, contextlib.suppress(OSError):
            assert self._descriptor is not None
            again = self._open()
            self._descriptor, old = again, self._descriptor
            self._waiting = self._unsynced + self._waiting
            self._unsynced, self._torn = [], True
            os.close(old)
            self._append()


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records of a run; a last line that a kill cut short is not one."""
    records = []
    for line in (run_dir / METRICS_FILE).read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            records.append(json.loads(line))
    return records
