"""A folder of this machine that holds what was fetched: one process fetches a file, the others wait for it.

    SHA256.tar, SHA256.idx      whole and checked, named by content: data sets and runs can share the folder
    SHA256.tar.SIZE.HOST.part   being fetched by whoever has its lock (flock: the kernel lets go of a dead
                                process's); the next one goes on where it ends

A file comes by rename, so what is there is whole. Room is made by unlinking what was used longest ago, which
takes nothing from a process that has it open.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from shutil import disk_usage
from typing import NamedTuple

from data_pipeline.disk import file_sha256
from data_pipeline.fault import UserError
from data_pipeline.locks import is_at, lock, lockable, try_lock
from data_pipeline.transfer import Body, Patience, StoppedError, Wanted, transfer

ENTRY = re.compile(r"[0-9a-f]{64}\.(tar|idx)")
PART = re.compile(r"[0-9a-f]{64}\.(?:tar|idx)\.([0-9]+)\..*\.part", re.DOTALL)
FOLDER_LOCK = "lock"
BLOCK = 1 << 20
LOOK_AGAIN = 0.02  # seconds between two looks at a lock that another process has
FRESH_INDEX = 60.0  # seconds in which an index is about to be opened by its path, so it stays
CHECKS = 2  # transfers with a wrong checksum before the file is given up


class Entry(NamedTuple):
    """A file that can be in the cache: what it is, where it comes from, its SHA-256 in hex."""

    kind: str  # "tar" or "idx"
    wanted: Wanted
    sha256: str

    @property
    def name(self) -> str:
        """Its file name in the cache."""
        return f"{self.sha256}.{self.kind}"


class _Contents(NamedTuple):
    """What is in the folder, in bytes, and what of it could go: last use in ns, path, bytes."""

    stored: int
    promised: int  # to files that are being fetched, beyond what they have already
    idle: list[tuple[int, Path, int]]


class Cache:
    """Keeps files under a budget of bytes. It has no locks or threads, so it may be copied and forked."""

    def __init__(self, folder: Path, budget: int, body: Body, patience: Patience) -> None:
        self.folder, self.budget = folder, budget
        self._body, self._patience = body, patience
        self._sound: set[str] = set()  # files that were read again and found right

    def path(self, entry: Entry, stop: threading.Event | None = None) -> Path:
        """The file, fetched if it is not there; once somebody needs room for others it may be gone again."""
        os.close(self.open(entry, stop))
        return self.folder / entry.name

    def open(self, entry: Entry, stop: threading.Event | None = None) -> int:
        """A descriptor of the file, for reading, fetched if it is not there. It stays whole while it is open.

        DATA where it cannot be fetched, CONFIG where it is larger than the whole budget.
        """
        while True:
            descriptor = self._present(entry)
            if descriptor is None:
                with self._turn(entry, stop) as part:
                    descriptor = self._present(entry)
                    if part is not None and descriptor is None:
                        descriptor = self._fetch(entry, part, stop)
            if descriptor is not None:
                return descriptor

    def forget(self, entry: Entry) -> bool:
        """Drop a file that is no longer what was fetched; whether that was so. A sound one is read once."""
        path = self.folder / entry.name
        if entry.sha256 not in self._sound:
            with suppress(FileNotFoundError):
                if file_sha256(path) != entry.sha256:
                    path.unlink()
                    return True
                self._sound.add(entry.sha256)
        return False

    def _present(self, entry: Entry) -> int | None:
        """A descriptor of what is there, marked as used now. Who reads a tar checks it, member by member."""
        path, size = self.folder / entry.name, entry.wanted.size
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if _size(descriptor) == size or (size is None and _digest(descriptor).hexdigest() == entry.sha256):
            os.utime(descriptor)
            return descriptor
        os.close(descriptor)
        path.unlink(missing_ok=True)
        return None

    @contextmanager
    def _turn(self, entry: Entry, stop: threading.Event | None) -> Iterator[int | None]:
        """The locked unfinished file; None where another process finished it while this one waited."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._part(entry)
        with lockable(path, create=True) as descriptor:
            while not try_lock(descriptor):
                if stop is not None and stop.is_set():
                    raise StoppedError
                time.sleep(LOOK_AGAIN)
            try:
                yield descriptor if is_at(descriptor, path) else None
            finally:
                if _size(descriptor) == 0 and is_at(descriptor, path):
                    path.unlink()

    def _part(self, entry: Entry) -> Path:
        # The host is in the name because not every network file system's locks reach from one to the next.
        host = re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname())[:64]
        return self.folder / f"{entry.name}.{entry.wanted.size or 0}.{host}.part"

    def _fetch(self, entry: Entry, part: int, stop: threading.Event | None) -> int:
        """Fill the locked unfinished file, check it, give it its name: a descriptor of it for reading."""
        self._make_room(entry)
        path = self._part(entry)
        for _ in range(CHECKS):
            if self._fill(entry, part, stop) == entry.sha256:
                # Open before it has its name: from then on another process may make room with it.
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                os.utime(descriptor)
                path.rename(self.folder / entry.name)
                return descriptor
            os.ftruncate(part, 0)
        raise UserError(
            f"'{entry.wanted.url}' came {CHECKS} times with a SHA-256 that is not the one in dataset.json",
            mend="put the file there again from where it was whole, or a dataset.json that belongs to it",
        )

    def _fill(self, entry: Entry, part: int, stop: threading.Event | None) -> str:
        """Transfer what the unfinished file lacks; the SHA-256 of all of it."""
        if entry.wanted.size is None or _size(part) > entry.wanted.size:
            os.ftruncate(part, 0)
        digest, path = _digest(part), self._part(entry)
        start = os.lseek(part, 0, os.SEEK_END)

        def write(chunk: bytes) -> None:
            digest.update(chunk)
            _write(part, chunk, path)

        transfer(entry.wanted, self._body, write, start=start, patience=self._patience, stop=stop)
        return digest.hexdigest()

    def _make_room(self, entry: Entry) -> None:
        """Unlink what was used longest ago until `entry` fits, into the budget and onto the disk.

        What others are fetching now stays, and counts with the size it will have.
        """
        need = entry.wanted.size or 0
        if need > self.budget:
            raise UserError(
                f"'{entry.wanted.url}' has {need:,} bytes, the cache '{self.folder}' may hold "
                f"{self.budget:,}",
                mend="give the cache more bytes (a few shards for each process), or pack smaller shards",
                code="CONFIG",
            )
        with lockable(self.folder / FOLDER_LOCK, create=True) as descriptor:
            lock(descriptor)
            found = self._contents(self._part(entry).name)
            used = found.stored + found.promised
            room = min(self.budget, found.stored + disk_usage(self.folder).free)
            for _, path, size in sorted(found.idle):
                if used + need <= room:
                    break
                if _drop(path):
                    used -= size

    def _contents(self, mine: str) -> _Contents:
        """Everything but the unfinished file `mine`."""
        stored, promised, idle = 0, 0, []
        for item in os.scandir(self.folder):
            entry, part = ENTRY.fullmatch(item.name), PART.fullmatch(item.name)
            if item.name == mine or not (entry or part):
                continue
            with suppress(FileNotFoundError):  # gone since the folder was read
                about, path = item.stat(follow_symlinks=False), Path(item.path)
                busy = part is not None and _is_locked(path)
                stored += about.st_size
                if part and busy:
                    promised += max(0, int(part[1]) - about.st_size)
                elif not (entry and entry[1] == "idx" and time.time() < about.st_mtime + FRESH_INDEX):
                    idle.append((about.st_mtime_ns, path, about.st_size))
        return _Contents(stored, promised, idle)


def _is_locked(path: Path) -> bool:
    with lockable(path, create=False) as descriptor:
        return not try_lock(descriptor)


def _drop(path: Path) -> bool:
    """Unlink a whole file, or an unfinished one that nobody is at; whether that was done."""
    if not PART.fullmatch(path.name):
        path.unlink(missing_ok=True)
        return True
    with suppress(FileNotFoundError), lockable(path, create=False) as descriptor:
        if not try_lock(descriptor):
            return False
        path.unlink()
    return True


def _size(descriptor: int) -> int:
    return os.fstat(descriptor).st_size


def _digest(descriptor: int) -> hashlib._Hash:
    """SHA-256 of what is in the file so far, to be gone on with."""
    digest, at = sha256(), 0
    while block := os.pread(descriptor, BLOCK, at):
        digest.update(block)
        at += len(block)
    return digest


def _write(descriptor: int, chunk: bytes, path: Path) -> None:
    view = memoryview(chunk)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError as error:  # a full disk: make it less full, and tell the user which file it was
        os.ftruncate(descriptor, 0)
        raise OSError(error.errno, error.strerror, str(path)) from None
