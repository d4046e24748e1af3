"""Writes pictures into WebDataset tars: the same input gives the same bytes, however many workers or stops.

Which picture goes into which tar is fixed before any worker starts. A picture that cannot be read is left out
and reported, because one broken file must not cost a night of packing, and training must never meet it. What
is finished is noted tar by tar: a packing goes on where it was broken off, and several machines may share it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_pipeline.crew import run_jobs
from data_pipeline.dataset_summary import remarks, summed
from data_pipeline.disk import replace_file
from data_pipeline.fault import UserError
from data_pipeline.index import DATASET_FILE, DatasetIndex, read_dataset, write_dataset
from data_pipeline.items import Source
from data_pipeline.packed_shard import ShardJob, Storage, write_shard
from data_pipeline.packing_plan import PackingOptions, Plan, make_plan
from data_pipeline.packing_state import (
    BAD_FILES,
    begin,
    check_begun,
    check_free,
    finish,
    locked,
    parts_seen,
    record,
    recorded,
)

NAMED = 5  # missing tars that an error lists

Progress = Callable[[int], object]  # is told of that many pictures more
Say = Callable[[str], object]


@dataclass(frozen=True)
class Packed:
    """The finished data set, the files that were left out, with the reason, and what else to know of it."""

    dataset: DatasetIndex
    bad: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...]


def pack(
    source: Source,
    destination: Path,
    *,
    workers: int,
    seed: int,
    shard_samples: int,
    shard_bytes: int,
    resize_shorter: int | None = None,
    reencode: bool = False,
    quality: int = 90,
    progress: Progress | None = None,
) -> Packed:
    """Write the tars, their indexes and, last, dataset.json; DATA where `destination` is taken."""
    options = PackingOptions(seed, shard_samples, shard_bytes, Storage(resize_shorter, reencode, quality))
    return pack_whole(source, destination, options, workers=workers, progress=progress)


def pack_whole(
    source: Source,
    destination: Path,
    options: PackingOptions,
    *,
    workers: int,
    fresh: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Packed:
    """The same, in the words of the command.

    Goes on where the same packing was broken off; where another one was, nothing of that is kept if `fresh`,
    else it is DATA.
    """
    check_free(destination)
    plan = make_plan(source, destination, options)
    with locked(destination):
        begin(destination, plan, fresh=fresh)
        if not (destination / DATASET_FILE).exists():
            _write_missing(plan, plan.jobs, workers, progress, say)
        return _finished(source, destination, plan)


def pack_part(
    source: Source,
    destination: Path,
    options: PackingOptions,
    *,
    part: tuple[int, int],
    workers: int,
    progress: Progress | None = None,
    say: Say | None = None,
) -> int:
    """Write the tars of the i-th of n parts (from 1), for `merge_parts`; how many these are.

    Parts may be written at the same time, on several machines that share the destination.
    """
    check_free(destination)
    plan = make_plan(source, destination, options)
    jobs = plan.share(part)
    with locked(destination, part):
        begin(destination, plan, fresh=False)
        _write_missing(plan, jobs, workers, progress, say)
    return len(jobs)


def merge_parts(source: Source, destination: Path, options: PackingOptions) -> Packed:
    """Sum up the parts that were written and write dataset.json; DATA names the tars that are missing."""
    check_free(destination)
    check_begun(destination)
    plan = make_plan(source, destination, options)
    with locked(destination):
        begin(destination, plan, fresh=False)
        if missing := [job for job in plan.jobs if recorded(plan, job) is None]:
            raise _incomplete(plan, missing, destination)
        return _finished(source, destination, plan)


def _write_missing(
    plan: Plan, jobs: Sequence[ShardJob], workers: int, progress: Progress | None, say: Say | None
) -> None:
    """Write those of `jobs` that no earlier start has finished."""
    missing = [job for job in jobs if recorded(plan, job) is None]
    progress = progress or _unheard
    if len(missing) < len(jobs):
        (say or _unheard)(f"going on: {len(jobs) - len(missing)} of {len(jobs)} shards were done")
        progress(_pictures(jobs) - _pictures(missing))
    write = partial(_write_and_record, plan.digest)
    run_jobs(
        write,
        missing,
        workers=workers,
        progress=progress,
        describe=_name,
        again="start again, it goes on where it stopped; if memory ran out, give fewer: --workers 1",
    )


def _write_and_record(plan: str, job: ShardJob, tick: Callable[[], object]) -> None:
    record(plan, job, write_shard(job, tick))


def _finished(source: Source, destination: Path, plan: Plan) -> Packed:
    """Everything is written: sum it up. Nothing to sum up where only the tidying was broken off."""
    if (destination / DATASET_FILE).exists():
        dataset, bad, known = read_dataset(destination), _read_bad(destination / BAD_FILES), []
    else:
        results = [result for job in plan.jobs if (result := recorded(plan, job)) is not None]
        bad = [(path, error) for result in results for path, error in result.bad]
        dataset = summed(source, results)
        known = remarks(dataset, results)
        _write_bad(destination / BAD_FILES, bad)
        write_dataset(destination, dataset)
    finish(destination)
    return Packed(dataset, tuple(bad), tuple(known))


def _incomplete(plan: Plan, missing: list[ShardJob], destination: Path) -> UserError:
    absent = {job.path.name for job in missing}
    names = ", ".join(sorted(absent)[:NAMED]) + (
        f" and {len(absent) - NAMED:,} more" if len(absent) > NAMED else ""
    )
    parts = [
        f"{number}/{count}"
        for count in sorted(parts_seen(destination))
        for number in range(1, count + 1)
        if any(job.path.name in absent for job in plan.share((number, count)))
    ]
    return UserError(
        f"{len(absent):,} of {len(plan.jobs):,} shards of '{destination}' are missing: {names}",
        mend=f"pack them first: --part {', '.join(parts) or 'I/N'}, or all without --part and --merge",
    )


def _write_bad(path: Path, bad: Sequence[tuple[str, str]]) -> None:
    if not bad:
        path.unlink(missing_ok=True)
        return
    rows = [json.dumps({"path": file, "error": error}, ensure_ascii=False) for file, error in bad]
    text = "\n".join(rows) + "\n"
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"))


def _read_bad(path: Path) -> list[tuple[str, str]]:
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(row["path"], row["error"]) for row in rows]


def _pictures(jobs: Iterable[ShardJob]) -> int:
    return sum(len(job.items) for job in jobs)


def _name(job: ShardJob) -> str:
    return job.path.name


def _unheard(_: object) -> None:
    """Where nobody asked."""
