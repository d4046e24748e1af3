"""Locks on files that end with the process that has them, however it dies, and that no child inherits."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_lockable: set[int] = set()  # descriptors of this process that may hold a lock


def _let_go() -> None:
    """In a forked child: a lock lasts as long as any copy of its descriptor, so the child keeps none."""
    while _lockable:
        os.close(_lockable.pop())


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def lockable(path: Path, *, create: bool) -> Iterator[int]:
    """A descriptor for reading, writing and locking; in the end the lock is off and the descriptor closed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o666)
    _lockable.add(descriptor)
    try:
        yield descriptor
    finally:
        _lockable.discard(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def lock(descriptor: int) -> None:
    """Lock the file, waiting for whoever has it."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def try_lock(descriptor: int) -> bool:
    """Lock the file unless somebody has it; whether that was done."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one with this name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
