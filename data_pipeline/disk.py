"""Files as a whole: their checksum, a push to the disk, replacing one without half of it being seen."""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex."""
    digest = sha256()
    with path.open("rb") as data:
        while block := data.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync_file(path: Path) -> None:
    """Push a file's (or folder's) content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour and rename it to `path`, through to the disk."""
    part = path.with_name(f".{path.name}.part")
    write(part)
    fsync_file(part)
    part.replace(path)
