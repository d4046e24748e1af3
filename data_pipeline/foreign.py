"""Makes a data set of foreign tars as they are: an index for each, and dataset.json; nothing is repacked.

Memory is that of one tar for each worker: what came of a tar waits on the disk until all have been read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.crew import run_jobs
from data_pipeline.draws import hash64
from data_pipeline.fault import UserError
from data_pipeline.final_index import FinalJob, Looked, finish_shard, read_looked
from data_pipeline.foreign_shard import DraftJob, draft_shard
from data_pipeline.foreign_totals import (
    Classes,
    Totals,
    image_extensions,
    looked_at,
    settle_classes,
    summed,
)
from data_pipeline.index import DATASET_FILE, DatasetIndex, Members, Shard, write_dataset
from data_pipeline.indexing_state import check_free, drafting
from data_pipeline.member_kinds import Reading
from data_pipeline.pixel_values import moments
from data_pipeline.shard_draft import NAMED, Draft, DraftFiles
from data_pipeline.shard_index import read_shard_index

LOOKED_AT = 1000  # training images that are decoded for mean and deviation
AT_ONCE = 1 << 22  # hashes of keys that are compared in memory


@dataclass(frozen=True)
class IndexOptions:
    """What the user decides: names of the classes (empty: found), what is left out, what is overwritten."""

    classes: tuple[str, ...] = ()
    skip_incomplete: bool = False
    shard_scope: bool = False  # the tar's name becomes part of every key
    force: bool = False
    workers: int = 1


@dataclass(frozen=True)
class Indexed:
    """The data set that was made, and what its user should know besides."""

    dataset: DatasetIndex
    totals: Totals
    decoded: int  # images
    broken: list[str]


def index_tars(
    splits: dict[str, list[Path]],
    destination: Path,
    reading: Reading,
    *,
    options: IndexOptions,
    progress: Callable[[int], object] = lambda _count: None,
) -> Indexed:
    """Read all tars, write their indexes into `destination` and dataset.json last; DATA or UNSAFE for faults.

    `progress` is told 1 twice for each tar: when it has been read, and when its index is there.
    """
    check_free(destination, splits, force=options.force)
    with drafting(destination) as drafts:
        totals = _read_all(splits, drafts, reading, options=options, progress=progress)
        classes = settle_classes(totals, reading, options.classes)
        found = _Found(destination, reading, totals, classes, image_extensions(reading, totals))
        (destination / DATASET_FILE).unlink(missing_ok=True)  # of what was there: its indexes change now
        jobs = _final_jobs(splits, drafts, found)
        run_jobs(
            finish_shard, jobs, workers=options.workers, progress=progress, describe=lambda job: job.tar.name
        )
        looked = {job.tar.name: read_looked(drafts, job.tar.name) for job in jobs}
        dataset = _dataset(next(iter(splits.values()))[0].parent, found, looked)
        write_dataset(destination, dataset)
    broken = [line for one in looked.values() for line in one.broken]
    return Indexed(dataset, totals, sum(one.decoded for one in looked.values()), broken)


class _Found(NamedTuple):
    """What is settled when all tars have been read."""

    destination: Path
    reading: Reading
    totals: Totals
    classes: Classes
    images: tuple[str, ...]


def _read_all(
    splits: dict[str, list[Path]],
    drafts: DraftFiles,
    reading: Reading,
    *,
    options: IndexOptions,
    progress: Callable[[int], object],
) -> Totals:
    jobs = [
        DraftJob(tar, drafts, reading, options.classes, f"{tar.stem}/" if options.shard_scope else "")
        for tars in splits.values()
        for tar in tars
    ]
    run_jobs(
        draft_shard, jobs, workers=options.workers, progress=progress, describe=lambda job: job.path.name
    )
    totals = summed(splits, drafts, named=len(options.classes))
    _check_complete(totals, reading, skip=options.skip_incomplete)
    if not totals.splits:
        raise UserError(
            "the tars hold no samples", mend="members are named KEY.EXTENSION: 000123.jpg, 000123.cls"
        )
    for name, split in totals.splits.items():
        _check_keys(name, split.shards, drafts)
    return totals


def _check_complete(totals: Totals, reading: Reading, *, skip: bool) -> None:
    count = totals.no_image + totals.no_target
    if not count or skip:
        return
    listed = "\n".join(totals.incomplete)
    more = f"\nand {count - len(totals.incomplete):,} more" if count > len(totals.incomplete) else ""
    images = "/".join(reading.image) or "jpg/png/webp"
    raise UserError(
        f"{totals.no_image:,} samples have no image (.{images}), {totals.no_target:,} no target "
        f"(.{reading.target}):\n{listed}{more}",
        mend="complete the tars, or leave such samples out: --skip-incomplete",
    )


def _check_keys(split: str, shards: list[Shard], drafts: DraftFiles) -> None:
    """A key that two tars of a split have would make two samples of an evaluation one."""
    repeated = drafts.repeated_hashes([shard.name for shard in shards], at_once=AT_ONCE)
    if not len(repeated):
        return
    wanted = set(repeated[:NAMED].tolist())
    places: dict[str, list[str]] = {}
    for shard in shards:
        hashes = np.fromfile(drafts.hashes(shard.name), np.uint64)
        if not np.isin(hashes, repeated[:NAMED]).any():
            continue
        draft = drafts.read(shard.name)
        assert isinstance(draft, Draft)
        drafted = Shard(shard.name, draft.samples, draft.bytes, draft.sha256, draft.index_sha256)
        for key in read_shard_index(drafts.index(shard.name), drafted).keys:
            if hash64(key.encode()) in wanted:
                places.setdefault(key, []).append(shard.name)
    lines = [f"key {key!r} is in {' and in '.join(names)}" for key, names in places.items()]
    more = [f"and {len(repeated) - NAMED:,} more keys"] if len(repeated) > NAMED else []
    raise UserError(
        "\n".join([f"{len(repeated):,} keys are in two tars of {split}:", *lines, *more]),
        mend="if they are different samples, let the tar be part of the key: --key-scope shard",
        place={"shard": next(iter(places.values()))[1], "member": next(iter(places))},
    )


def _final_jobs(splits: dict[str, list[Path]], drafts: DraftFiles, found: _Found) -> list[FinalJob]:
    training = found.totals.splits.get("train")
    rows = looked_at([training] if training else list(found.totals.splits.values()), LOOKED_AT)
    numbers = {name: number for number, name in enumerate(found.classes.names)}
    return [
        FinalJob(
            tar, drafts, found.destination, found.reading.task, numbers, found.images, rows.get(tar.name, ())
        )
        for tars in splits.values()
        for tar in tars
        if tar.name not in found.totals.empty
    ]


def _dataset(folder: Path, found: _Found, looked: dict[str, Looked]) -> DatasetIndex:
    histogram = np.array([one.histogram for one in looked.values()], np.int64).sum(axis=0)
    if not histogram.any():
        first = next((line for one in looked.values() for line in one.broken), "")
        raise UserError(
            f"none of the images that were looked at can be decoded: {first}",
            mend="look at what the tars hold, or name the image member: --image EXT",
        )
    coloured = any(one.coloured for one in looked.values())
    mean, std = moments(histogram[: 3 if coloured else 1])
    sums = {name: one.index_sha256 for name, one in looked.items()}
    splits, classes = found.totals.splits, found.classes
    return DatasetIndex(
        task=found.reading.task,
        classes=classes.names,
        image_mode="RGB" if coloured else "L",
        mean=mean,
        std=std,
        splits={name: split.as_split(classes, sums) for name, split in splits.items()},
        members=Members(found.images, found.reading.target),
        mask_values=classes.mask_values,
        tars="" if folder.resolve() == found.destination.resolve() else str(folder),
    )
