"""Says what files a checkpoint consists of, and whether they still are what they were: MANIFEST.json."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.disk import file_sha256, write_file
from data_pipeline.fault import UserError
from training.checkpoints.tensor_file import Listed

T = TypeVar("T")

FORMAT = 1  # the next is 2, then 4, 7, 8: no two of these are one flipped bit apart, see `_refuse_the_future`
MANIFEST = "MANIFEST.json"
STATE = "state.json"
WEIGHTS = ".safetensors"

# A folder on NFS may be stale or not there yet on this machine: seconds to wait before it is read again.
PATIENCE = (0.1, 0.4)
PASSING = {errno.ESTALE, errno.ENOENT}


def write_manifest(folder: Path, step: int, listed: Mapping[str, Listed]) -> None:
    """Write down what the files of a checkpoint are; the last of its files."""
    described = {file: one._asdict() for file, one in sorted(listed.items())}
    write_json(folder / MANIFEST, {"format": FORMAT, "step": step, "files": described})


def write_json(path: Path, content: dict[str, Any]) -> Listed:
    """Write JSON through to the disk; its size and SHA-256."""
    text = (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
    write_file(path, [text])
    return Listed(len(text), sha256(text).hexdigest())


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None; RESUME where a later version wrote it."""
    try:
        return patiently(path, lambda: fault_of(path))
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read: {error.strerror or error}"


class _Damaged(Exception):
    """What is wrong with a checkpoint."""


def fault_of(path: Path) -> str | None:
    """`verify` at the first attempt, without patience; OSError where something cannot be read."""
    try:
        listed = listed_files(path)
        for name, one in listed.items():
            _check_file(path / name, one)
        # Hidden files are left to the system's and the desktop's own use (.nfs..., .DS_Store).
        visible = {file.name for file in path.iterdir() if not file.name.startswith(".")}
        if extra := sorted(visible - listed.keys() - {MANIFEST}):
            return f"{extra[0]} is not in {MANIFEST}"
    except _Damaged as fault:
        return str(fault)
    return None


def listed_files(path: Path) -> dict[str, Listed]:
    """What the manifest says of each file; OSError where it cannot be read."""
    text = (path / MANIFEST).read_bytes()
    try:
        manifest = json.loads(text)
        _refuse_the_future(path, manifest["format"])
        number, step, files = manifest["format"], int(manifest["step"]), dict(manifest["files"])
        listed = {name: Listed(int(one["size"]), str(one["sha256"])) for name, one in files.items()}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Damaged(f"{MANIFEST}: {error!r}") from None
    if number != FORMAT:
        raise _Damaged(f"{MANIFEST}: format {number}, this version reads {FORMAT}")
    if step != int(re.sub(r"\D", "", path.name)):
        raise _Damaged(f"{MANIFEST} is of step {step}")
    if strangers := [name for name in listed if Path(name).name != name]:
        raise _Damaged(f"{MANIFEST} names a file outside its folder: {strangers[0]!r}")
    if STATE not in listed or not any(name.endswith(WEIGHTS) for name in listed):
        raise _Damaged(f"{MANIFEST} lists no {STATE} or no tensors")
    return listed


def _check_file(file: Path, listed: Listed) -> None:
    size = file.stat().st_size
    if not file.is_file():
        raise _Damaged(f"{file.name} is no file")
    if size != listed.size:
        raise _Damaged(f"{file.name} has {size} bytes instead of {listed.size}")
    if file_sha256(file) != listed.sha256:
        raise _Damaged(f"the content of {file.name} has changed")


def _refuse_the_future(path: Path, number: Any) -> None:
    """RESUME where a manifest's format is a later one, and not ours with a flipped bit."""
    if not isinstance(number, int) or number <= FORMAT:
        return
    here, there = str(FORMAT).encode(), str(number).encode()
    flipped = sum((one ^ other).bit_count() for one, other in zip(here, there, strict=False))
    if len(here) != len(there) or flipped != 1:
        raise UserError(
            f"'{path}' has format {number}, this version reads format {FORMAT}",
            mend="use the version of lockstep that wrote it; or begin another run: --fresh",
            code="RESUME",
        )


def patiently(path: Path, read: Callable[[], T]) -> T:
    """Read again what may be there in a moment; OSError where it is not."""
    for seconds in PATIENCE:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            time.sleep(seconds)
            with contextlib.suppress(OSError):
                os.listdir(path)  # noqa: PTH208 - makes NFS look again
    return read()


def listed_sha256(path: Path, file: str) -> str:
    """The SHA-256 that a verified checkpoint's manifest gives for a file."""
    return patiently(path, lambda: listed_files(path))[file].sha256
