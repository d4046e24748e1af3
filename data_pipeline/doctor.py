"""Examines a whole data set, in processes over its shards, for everything that would waste a training run.

The findings depend on the data set and on how many samples are decoded, not on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from data_pipeline.crew import in_order
from data_pipeline.doctor_folder import check_folder
from data_pipeline.doctor_labels import no_labels
from data_pipeline.doctor_shards import Prints, ShardJob, Sums, examine_shard, open_dataset
from data_pipeline.doctor_splits import (
    TRAIN,
    SplitReport,
    Use,
    check_balance,
    check_digest,
    check_sizes,
    check_sums,
    check_traits,
)
from data_pipeline.doctor_twins import check_keys, check_twins, read_twins
from data_pipeline.fault import UserError
from data_pipeline.findings import HURTS, Finding, Findings
from data_pipeline.index import DATASET_FILE, DatasetIndex, Shard
from data_pipeline.spread import rows_by_shard, spread
from data_pipeline.store import Folder
from data_pipeline.urls import is_remote, local_path


@dataclass(frozen=True)
class Checked:
    """How much was looked at; `decoded` are tries, `bad_samples` those that training would skip."""

    samples: int = 0
    shards: int = 0
    bytes: int = 0
    decoded: int = 0
    bad_samples: int = 0


@dataclass(frozen=True)
class Diagnosis:
    """What was found, in a fixed order."""

    dataset: str
    checked: Checked
    findings: tuple[Finding, ...]

    @property
    def hurts(self) -> int:
        """How many findings would hurt."""
        return sum(one.count for one in self.findings if one.kind.severity == HURTS)


def examine(
    root: str,
    use: Use,
    *,
    sample: int | None = None,
    workers: int = 1,
    progress: Callable[[int], object] = lambda _done: None,
) -> Diagnosis:
    """Examine a data set, decoding all or `sample` of its samples; UserError where none is at `root`.

    `progress` is told the number of samples of each shard that is done.
    """
    open_dataset.cache_clear()  # it may be another one by now
    try:
        opened = open_dataset(root)
    except UserError as error:
        if error.code == "USAGE" or is_remote(root) or not (local_path(root) / DATASET_FILE).is_file():
            raise
        return Diagnosis(root, Checked(), (Finding("dataset-file", error.what, mending=error.mend),))
    dataset, found = opened.dataset, Findings()
    findings: list[Finding] = []
    if isinstance(opened.store, Folder):
        check_folder(opened.store.root, dataset, found)
    jobs = shard_jobs(root, dataset, sample)
    sums = {name: Sums(no_labels(dataset)) for name in _train_first(dataset)}
    prints: list[Prints] = []
    run = partial(in_order, workers=workers, describe=lambda job: _shard(dataset, job).name)
    for job, report in zip(jobs, run(examine_shard, jobs), strict=True):
        findings += report.findings
        prints.append(report.prints)
        sums[job.split] += report.sums
        progress(_shard(dataset, job).samples)
    check_keys(jobs, prints, found)
    check_twins(jobs, prints, partial(run, read_twins), found)
    splits = {name: SplitReport(name, dataset.splits[name], one) for name, one in sums.items()}
    use = replace(use, remote=not isinstance(opened.store, Folder))
    for split in splits.values():
        own = [one for job, one in zip(jobs, prints, strict=True) if job.split == split.name]
        check_digest(split, own, found)
        check_sums(dataset, split, found)
        check_sizes(split, use, found)
        check_traits(split, found)
    check_balance(dataset, splits, found)
    shards = [shard for split in dataset.splits.values() for shard in split.shards]
    checked = Checked(
        samples=sum(shard.samples for shard in shards),
        shards=len(shards),
        bytes=sum(shard.bytes for shard in shards),
        decoded=sum(one.tried for one in sums.values()),
        bad_samples=sum(one.bad for one in sums.values()),
    )
    return Diagnosis(root, checked, (*findings, *found.all()))


def sample_count(root: str) -> int:
    """Samples of all splits, for a progress bar; 0 where there is nothing to examine."""
    try:
        return sum(split.samples for split in open_dataset(root).dataset.splits.values())
    except UserError:
        return 0


def shard_jobs(root: str, dataset: DatasetIndex, sample: int | None) -> list[ShardJob]:
    """Every shard, train's first; of all samples together `sample` at even distances are to be decoded."""
    jobs = [
        ShardJob(root, name, position)
        for name in _train_first(dataset)
        for position in range(len(dataset.splits[name].shards))
    ]
    if sample is None or not jobs:
        return jobs
    sizes = [_shard(dataset, job).samples for job in jobs]
    rows = rows_by_shard(spread(sum(sizes), sample), sizes)
    return [job._replace(rows=one) for job, one in zip(jobs, rows, strict=True)]


def _shard(dataset: DatasetIndex, job: ShardJob) -> Shard:
    return dataset.splits[job.split].shards[job.position]


def _train_first(dataset: DatasetIndex) -> list[str]:
    """The names of the splits; a leak is reported where it must be mended, which is not train."""
    return sorted(dataset.splits, key=lambda name: name != TRAIN)
