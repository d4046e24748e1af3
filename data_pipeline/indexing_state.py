"""Where `lockstep index` may write, and the folder in which its drafts wait."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.fault import UserError
from data_pipeline.index import DATASET_FILE, index_name
from data_pipeline.shard_draft import DraftFiles

UNDER_WAY = ".indexing"
ELSEWHERE = "write the index into another folder: --out DEST"


def check_free(destination: Path, splits: dict[str, list[Path]], *, force: bool) -> None:
    """USAGE where a data set is there (unless `force`), or where another program's file would be lost."""
    if destination.exists() and not destination.is_dir():
        raise UserError(f"'{destination}' is a file", mend="give a folder: --out DEST", code="USAGE")
    if (destination / DATASET_FILE).exists() and not force:
        raise UserError(
            f"'{destination}' already holds a data set (dataset.json)",
            mend=f"replace it with --force, or {ELSEWHERE}",
            code="USAGE",
        )
    for tars in splits.values():
        for tar in tars:
            path = destination / index_name(tar.name)
            if path.exists() and not _is_ours(path):
                raise UserError(
                    f"'{path}' is there already and is no index of lockstep (other programs write .idx, too)",
                    mend=ELSEWHERE,
                    code="USAGE",
                )


@contextmanager
def drafting(destination: Path) -> Iterator[DraftFiles]:
    """A folder for drafts, while it lasts; USAGE where it cannot be written, DATA if another is at work."""
    state = destination / UNDER_WAY
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = (state / "lock").open("a")
    except OSError as error:
        raise UserError(
            f"cannot write into '{destination}': {error.strerror}", mend=ELSEWHERE, code="USAGE"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another lockstep index is writing to '{destination}'", mend="wait for it, or stop it"
            ) from None
        except OSError:
            pass  # a disk that knows no locks
        for leftover in state.iterdir():  # of one that was broken off
            if leftover.name != "lock":
                leftover.unlink()
        try:
            yield DraftFiles(state)
        finally:
            shutil.rmtree(state)


def _is_ours(path: Path) -> bool:
    """Whether a file is an index as `write_shard_index` writes it, of whatever version."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            return "lockstep" in json.loads(file.read(min(length, 1 << 20)))["__metadata__"]
        except (ValueError, LookupError, TypeError):
            return False
