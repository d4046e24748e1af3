"""Files as a whole: their checksum, a push to the disk, replacing one without half of it being seen.

What must survive a kill or a power cut is written by the functions below and by nothing else: each of their
calls of the system is one step, so that a test can stop before every one of them.
"""

# The calls of the system itself: what pathlib puts between differs from version to version.
# ruff: noqa: PTH102, PTH104, PTH106, PTH108, PTH208

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

BLOCK = 1 << 23  # bytes of one write: a kill is heard between two


class Activity:
    """Counts what the disk has done for this process: who waits for another thread sees whether it moves."""

    def __init__(self) -> None:
        self.done = 0


activity = Activity()


class Room(NamedTuple):
    """What is free on a volume."""

    volume: Path  # where it is mounted
    free: int  # bytes


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex."""
    digest = sha256()
    with path.open("rb") as data:
        while block := data.read(1 << 20):
            digest.update(block)
            activity.done += 1
    return digest.hexdigest()


def fsync_file(path: Path) -> None:
    """Push a file's (or folder's) content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        push(descriptor)
    finally:
        os.close(descriptor)


def push(descriptor: int) -> None:
    """Push what was written to the disk."""
    os.fsync(descriptor)
    activity.done += 1


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour and rename it to `path`, through to the disk.

    What cannot be finished is removed: it must not take room from what can.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        fsync_file(part)
        os.rename(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    fsync_file(path.parent)


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Make a file of the pieces, through to the disk, with the mode that the umask asks for."""
    write_files({path: pieces})


def write_files(files: Mapping[Path, Iterable[bytes | memoryview]]) -> None:
    """`write_file` of several: all are written before the first is pushed, so the disk is never idle.

    Where the system can, it forgets what it holds of them in memory: who reads them reads the disk.
    """
    with contextlib.ExitStack() as stack:
        descriptors = {}
        for path, pieces in files.items():
            descriptors[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, descriptors[path])
            with _naming(path):
                _write_early(descriptors[path], pieces)
        for path, descriptor in descriptors.items():
            with _naming(path):
                push(descriptor)
            _forget(descriptor)


def _write_early(descriptor: int, pieces: Iterable[bytes | memoryview]) -> None:
    """Write the pieces, and let the disk begin with each block while the next one is copied."""
    size = 0
    for piece in pieces:
        for begin in range(0, len(piece), BLOCK):
            block = memoryview(piece)[begin : begin + BLOCK]
            write_all(descriptor, block)
            size += len(block)
            if size >= BLOCK:
                _forget(descriptor)
                size = 0


def _forget(descriptor: int) -> None:
    """The system need not hold a file in memory; what the disk lacks of it, it begins to write."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """The system names no file where a call got an open one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of the content, however little the system takes at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest[:BLOCK]) :]
        activity.done += 1


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content; the target's mode is as the umask asks for."""
    with source.open("rb", buffering=0) as opened:
        block = bytearray(BLOCK)

        def pieces() -> Iterable[memoryview]:
            while size := opened.readinto(block):
                yield memoryview(block)[:size]

        write_file(target, pieces())


def make_folder(path: Path) -> None:
    """Make a folder in one that is there."""
    os.mkdir(path)


def rename(path: Path, target: Path) -> None:
    """Give a file or folder another name beside its own; both are in the parent until that is pushed."""
    os.rename(path, target)


def remove_folder(path: Path) -> None:
    """Remove a folder of files; OSError where it holds another folder."""
    for name in sorted(os.listdir(path)):
        os.unlink(path / name)
    os.rmdir(path)


def room_at(path: Path) -> Room:
    """What is free for this user where `path` is, or will be."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    told = os.statvfs(place)
    device = place.stat().st_dev
    while place != place.parent and place.parent.stat().st_dev == device:
        place = place.parent
    return Room(place, told.f_bavail * told.f_frsize)
