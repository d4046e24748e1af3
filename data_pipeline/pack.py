"""Writes pictures into WebDataset tars: the same input gives the same bytes, whatever the number of workers.

Which picture goes into which tar is fixed before any worker starts. A picture that cannot be read is left out
and reported, because one broken file must not cost a night of packing, and training must never meet it.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
from numpy.typing import NDArray

from data_pipeline.disk import file_sha256
from data_pipeline.draws import IntArray, Purpose, bit_stream, hash64, permutation
from data_pipeline.fault import UserError
from data_pipeline.index import (
    DATASET_FILE,
    DatasetIndex,
    Shard,
    Split,
    index_path,
    index_tar,
    write_dataset,
    write_shard_index,
)
from data_pipeline.pictures import stored_picture
from data_pipeline.sources import Picture, Source

BAD_FILES = "bad_files.jsonl"
# Present from the first byte to the last: what lies beside it is ours and not finished.
UNDER_WAY = ".packing"


@dataclass(frozen=True)
class ShardJob:
    """What one worker writes: a tar at `path` with these pictures, in this order."""

    path: Path
    split: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class ShardResult:
    """What came of it. `histogram` counts pixel values, int64 [3, 256]: exact sums for mean and deviation."""

    split: str
    shard: Shard
    labels: tuple[int, ...]
    keys_digest: int
    histogram: NDArray[np.int64]
    coloured: bool
    bad: tuple[tuple[str, str], ...]  # path, what is wrong


@dataclass(frozen=True)
class Packed:
    """The finished data set and the files that were left out, with the reason."""

    dataset: DatasetIndex
    bad: tuple[tuple[str, str], ...]


def pack(
    source: Source,
    destination: Path,
    *,
    workers: int,
    seed: int,
    shard_samples: int,
    shard_bytes: int,
    progress: Callable[[int], object] | None = None,
) -> Packed:
    """Write the tars, their indexes and, last, dataset.json; DATA where `destination` is taken.

    A tar is closed at `shard_samples` samples or `shard_bytes` bytes of source files, whichever comes first.
    `progress` is told the number of pictures of each tar that is done.
    """
    check_free(destination)
    destination.mkdir(parents=True, exist_ok=True)
    for leftover in destination.iterdir():  # of a packing that was broken off, or `check_free` had refused
        leftover.unlink()
    (destination / UNDER_WAY).touch()
    jobs = shard_jobs(source, destination, seed=seed, shard_samples=shard_samples, shard_bytes=shard_bytes)
    results: list[ShardResult] = []
    for job, result in zip(jobs, _run(jobs, workers), strict=True):
        results.append(result)
        if progress is not None:
            progress(len(job.pictures))
    bad = tuple(entry for result in results for entry in result.bad)
    if bad:
        rows = [json.dumps({"path": path, "error": error}, ensure_ascii=False) for path, error in bad]
        text = "\n".join(rows) + "\n"
        (destination / BAD_FILES).write_text(text, encoding="utf-8", errors="backslashreplace")
    dataset = _summed(source, [result for result in results if result.shard.samples])
    write_dataset(destination, dataset)
    (destination / UNDER_WAY).unlink()
    return Packed(dataset, bad)


def shard_jobs(
    source: Source, destination: Path, *, seed: int, shard_samples: int, shard_bytes: int
) -> list[ShardJob]:
    """Cut every split, in a random order fixed by `seed`, into tars: neighbours are a random sample."""
    jobs: list[ShardJob] = []
    for number, split in enumerate(sorted({picture.split for picture in source.pictures})):
        members = sorted((one for one in source.pictures if one.split == split), key=lambda one: one.key)
        order = permutation(len(members), bit_stream(seed, Purpose.PACKING, at=(0, number)))
        chunks: list[list[Picture]] = []
        filled = 0
        for row in order:
            size = _bytes_of(members[row].path)
            if not chunks or len(chunks[-1]) >= shard_samples or filled + size > shard_bytes:
                chunks.append([])
                filled = 0
            chunks[-1].append(members[row])
            filled += size
        jobs += [
            ShardJob(destination / f"{split}-{count:06d}.tar", split, tuple(chunk))
            for count, chunk in enumerate(chunks)
        ]
    return jobs


def _bytes_of(path: Path) -> int:
    """0 for what is not there (a dangling link): the worker that comes to read it reports it."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def write_shard(job: ShardJob) -> ShardResult:
    """Write one tar and its index under temporary names and rename them; the unit of work of a worker."""
    histogram = np.zeros((3, 256), np.int64)
    coloured = False
    labels: list[int] = []
    digest = 0
    bad: list[tuple[str, str]] = []
    part = job.path.with_name(f".{job.path.name}.part")
    # PAX headers appear only where a name needs them (long or not ASCII); plain ustar would refuse it.
    with part.open("wb") as file, webdataset.TarWriter(file, mtime=0, format="PAX_FORMAT") as tar:
        for picture in job.pictures:
            try:
                extension, data, shown = stored_picture(picture.path)
            except (OSError, ValueError) as error:
                bad.append((str(picture.path), str(error)))
                continue
            tar.write({"__key__": picture.key, extension: data, "cls": str(picture.label)})
            counts = np.array(shown.histogram(), np.int64).reshape(-1, 256)
            histogram += counts  # a grey picture counts alike in all three channels
            coloured |= len(counts) == 3
            labels.append(picture.label)
            digest += hash64(picture.key.encode())
    write_shard_index(index_path(job.path), index_tar(part))
    shard = Shard(job.path.name, len(labels), part.stat().st_size, file_sha256(part))
    part.replace(job.path)
    if not labels:
        job.path.unlink()
        index_path(job.path).unlink()
    return ShardResult(job.split, shard, tuple(labels), digest % 2**64, histogram, coloured, tuple(bad))


def _run(jobs: list[ShardJob], workers: int) -> Iterator[ShardResult]:
    """In the order of `jobs`. Spawned, not forked: torch is loaded, whose threads do not survive a fork."""
    if workers <= 1 or len(jobs) == 1:
        yield from map(write_shard, jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn")) as pool:
        # Workers inherit deafness to Ctrl-C, to which each would answer with a traceback; we end them below.
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
        futures = [pool.submit(write_shard, job) for job in jobs]
        signal.signal(signal.SIGINT, heard)
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                f"a packing process was killed from outside, with {workers} of them at work",
                mend="if memory ran out, give fewer: --workers 1",
            ) from None
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def check_free(destination: Path) -> None:
    """Refuse, with DATA, to write where something else is; a broken-off packing is no hindrance."""
    if (destination / DATASET_FILE).exists():
        raise UserError(
            f"'{destination}' already holds a data set", mend="give another folder, or remove this one"
        )
    if destination.exists() and not destination.is_dir():
        raise UserError(f"'{destination}' is a file", mend="give a folder that is empty or not there yet")
    strangers = sorted(path.name for path in destination.glob("*") if not _ours(path.name))
    if (destination / UNDER_WAY).exists() and not strangers:
        return
    if destination.exists() and (others := sorted(path.name for path in destination.iterdir())):
        raise UserError(
            f"'{destination}' holds other files, such as {(strangers or others)[0]!r}",
            mend="give a folder that is empty or not there yet",
        )


def _ours(name: str) -> bool:
    return name.endswith((".tar", ".idx", ".part")) or name in (BAD_FILES, UNDER_WAY)


def _summed(source: Source, results: list[ShardResult]) -> DatasetIndex:
    counts: dict[str, IntArray] = {}
    for result in results:
        labels = np.array(result.labels, np.int64)
        here = np.bincount(labels, minlength=len(source.classes))
        counts[result.split] = counts.get(result.split, 0) + here
    training = counts.get("train", np.zeros(len(source.classes), np.int64))
    if unseen := [name for name, count in zip(source.classes, training, strict=True) if count == 0]:
        raise UserError(
            f"class {unseen[0]!r} has no picture in the training split that can be read",
            mend="add pictures to it, hold out fewer (--val-fraction), or remove the class",
        )
    splits = {}
    for split, count in counts.items():
        members = [result for result in results if result.split == split]
        digest = sum(result.keys_digest for result in members) % 2**64
        shards = tuple(result.shard for result in members)
        splits[split] = Split(shards, tuple(count.tolist()), f"{digest:016x}")
    coloured = any(result.coloured for result in results)
    histogram = sum(result.histogram for result in results if result.split == "train")
    mean, std = _moments(np.asarray(histogram)[: 3 if coloured else 1])
    return DatasetIndex("multiclass", source.classes, "RGB" if coloured else "L", mean, std, splits)


def _moments(histogram: NDArray[np.int64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel of pixel values scaled to 0..1, from exact counts."""
    values = np.arange(256) / 255
    weights = histogram / histogram.sum(axis=1, keepdims=True)
    mean = weights @ values
    std = np.sqrt(np.maximum(weights @ values**2 - mean**2, 0))
    return tuple(np.round(mean, 6).tolist()), tuple(np.round(np.maximum(std, 1e-3), 6).tolist())
