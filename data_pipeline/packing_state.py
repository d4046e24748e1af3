"""A packing that is not finished, on the disk: its plan, a result for each finished tar, who is at work."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipeline.disk import fsync_file
from data_pipeline.fault import UserError
from data_pipeline.index import DATASET_FILE, index_name, index_path
from data_pipeline.packed_shard import ShardJob
from data_pipeline.packing_plan import Plan, shard_name
from data_pipeline.shard_result import ShardResult, result_from_json

BAD_FILES = "bad_files.jsonl"
# Present from the first byte to the last: what lies beside it is ours and not finished.
UNDER_WAY = ".packing"
PLAN, LOCK = "plan.json", "lock"
PART_LOCK = re.compile(r"part-(\d+)-of-(\d+)\.lock")
WORDS = {
    "format": "by another version of lockstep",
    "pillow": "with another version of Pillow",
    "task": "for another task",
    "classes": "with other classes",
    "samples": "with another number of pictures",
    "listing": "with other files in the source, or other sizes, times, labels or splits of them",
}


def check_free(destination: Path) -> None:
    """Refuse, with DATA, to write where something else is; a broken-off packing is no hindrance."""
    if destination.exists() and not destination.is_dir():
        raise UserError(f"'{destination}' is a file", mend="give a folder that is empty or not there yet")
    begun = _begun(destination)
    if (destination / DATASET_FILE).exists() and begun is None:
        with suppress(OSError):
            (destination / UNDER_WAY).rmdir()  # empty where a kill came just before this
        raise UserError(
            f"'{destination}' already holds a data set", mend="give another folder, or remove this one"
        )
    ours = _names(begun["shards"] if begun else {})
    found = sorted(path.name for path in destination.iterdir()) if destination.is_dir() else []
    if strangers := [name for name in found if name not in ours]:
        raise UserError(
            f"'{destination}' holds other files, such as {strangers[0]!r}",
            mend="give a folder that is empty or not there yet",
        )


def check_begun(destination: Path) -> None:
    """Refuse, with DATA, to merge where no part was packed."""
    if _begun(destination) is None:
        raise UserError(
            f"'{destination}' holds no parts", mend="pack the parts first: --part 1/N to --part N/N"
        )


@contextmanager
def locked(destination: Path, part: tuple[int, int] | None = None) -> Iterator[None]:
    """Be the only one who packs here; of several parts, the only one who packs this part. DATA otherwise.

    On disks that know no locks nothing is locked.
    """
    state = destination / UNDER_WAY
    state.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        wanted = [(LOCK, fcntl.LOCK_SH if part else fcntl.LOCK_EX)]
        wanted += [(f"part-{part[0]}-of-{part[1]}.lock", fcntl.LOCK_EX)] if part else []
        for name, kind in wanted:
            file = files.enter_context((state / name).open("a"))
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another lockstep pack is writing to '{destination}'", mend="wait for it, or stop it"
                ) from None
            except OSError:
                continue
        check_free(destination)  # once more: the other one may have come to its end meanwhile
        yield


def begin(destination: Path, plan: Plan, *, fresh: bool) -> None:
    """Note the plan, or go on with it; DATA where another plan was begun here, unless `fresh` drops that."""
    begun = _begun(destination)
    if begun is not None and fresh and not (destination / DATASET_FILE).exists():
        drop(destination, begun["shards"])
        begun = None
    if begun is None:
        begun = {"identity": plan.identity, "shards": plan.shards}
        _put(destination / UNDER_WAY / PLAN, json.dumps(begun, indent=1) + "\n")
        begun = _begun(destination) or begun  # another part, with other options, may have been faster
    if begun["identity"] != plan.identity:
        raise UserError(
            f"'{destination}' holds a packing that was begun {_difference(begun['identity'], plan.identity)}",
            mend="give the options and the source it was begun with, or start over: --fresh",
        )


def drop(destination: Path, shards: dict[str, int]) -> None:
    """Remove the files of a packing that was begun; `check_free` has seen that there are no others."""
    for name in _names(shards) - {UNDER_WAY}:
        (destination / name).unlink(missing_ok=True)
    for path in (destination / UNDER_WAY).glob("*.json"):
        if path.name != PLAN:
            path.unlink()
    (destination / UNDER_WAY / PLAN).unlink()


def finish(destination: Path) -> None:
    """Remove what only an unfinished packing needs; the plan last, without which nothing is begun."""
    state = destination / UNDER_WAY
    names = sorted((path.name for path in state.iterdir()), key=lambda name: (name == PLAN, name))
    for name in names:
        (state / name).unlink()
    state.rmdir()


def record(plan: str, job: ShardJob, result: ShardResult) -> None:
    """Note that a tar is finished; both it and its index are in place."""
    _put(_result_path(job), result.as_json(plan))


def recorded(plan: Plan, job: ShardJob) -> ShardResult | None:
    """The result of a tar that is finished and still has its size; None where it must be packed."""
    try:
        result = result_from_json(_result_path(job).read_text(encoding="utf-8"), plan.digest)
        if result is None or not result.samples:
            return result
        sizes = job.path.stat().st_size, index_path(job.path).stat().st_size
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return result if sizes == (result.bytes, result.index_bytes) else None


def parts_seen(destination: Path) -> set[int]:
    """Into how many parts it was cut, by the parts that were begun."""
    found = [PART_LOCK.fullmatch(path.name) for path in (destination / UNDER_WAY).iterdir()]
    return {int(match[2]) for match in found if match}


def _begun(destination: Path) -> dict[str, Any] | None:
    """The plan that was noted; None where there is none, or not one of ours."""
    try:
        begun = json.loads((destination / UNDER_WAY / PLAN).read_text(encoding="utf-8"))
        shards = {str(split): int(count) for split, count in begun["shards"].items()}
        return {"identity": dict(begun["identity"]), "shards": shards}
    except (OSError, LookupError, TypeError, ValueError, AttributeError):
        return None


def _names(shards: dict[str, int]) -> set[str]:
    """Every name that a packing of these tars may leave in the destination."""
    tars = [shard_name(split, number) for split, count in shards.items() for number in range(count)]
    files = [*tars, *map(index_name, tars), BAD_FILES, DATASET_FILE]
    return {UNDER_WAY, *files, *(f".{name}.part" for name in files)} if shards else {UNDER_WAY}


def _difference(begun: dict[str, Any], now: dict[str, Any]) -> str:
    differing = [name for name in now if begun.get(name) != now[name]]
    words = [
        WORDS.get(name)
        or f"with --{name.replace('_', '-')} {_shown(begun.get(name))}, not {_shown(now[name])}"
        for name in differing
        if name != "listing" or differing == ["listing"]
    ]
    return ", ".join(words)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "unset" if value is None else str(value)


def _result_path(job: ShardJob) -> Path:
    return job.path.parent / UNDER_WAY / f"{job.path.name}.json"


def _put(path: Path, text: str) -> None:
    """As a whole or not at all; parts on several machines may put the same file at the same time."""
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    fsync_file(part)
    part.replace(path)
