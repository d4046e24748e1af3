"""Reads one foreign tar to its end and drafts its index: labels are numbered when all tars have been read.

Shapes: R samples of the tar, N names found in it (classes or labels).
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from data_pipeline.decode import FORMATS
from data_pipeline.draws import hash64
from data_pipeline.fault import UserError, first_line
from data_pipeline.masks import read_mask
from data_pipeline.member_kinds import Reading
from data_pipeline.shard_draft import Draft, DraftFiles, lacking
from data_pipeline.shard_index import MISSING, make_shard_index, write_shard_index
from data_pipeline.targets import MAX_CLASSES, MAX_LABELS, MAX_MEMBER, from_list, parse_class, parse_labels
from data_pipeline.tars import TarIndex, index_one

MAX_PICTURE = 1 << 28  # bytes of a mask that is read
PICTURE_HEADER = 1 << 20  # bytes of an image in which its size is looked for


@dataclass(frozen=True)
class DraftJob:
    """One tar to read, and where its draft goes.

    `classes` are the names that the user gave, if any; `prefix` is put in front of every key.
    """

    path: Path
    drafts: DraftFiles
    reading: Reading
    classes: tuple[str, ...]
    prefix: str


class MaskSums(NamedTuple):
    """A mask's height and width, and its raw values with the number of pixels of each."""

    size: tuple[int, int]
    values: NDArray[np.int64]
    pixels: NDArray[np.int64]


def draft_shard(job: DraftJob, tick: Callable[[], object]) -> None:
    """Read a tar and keep its draft, or what is wrong with it: so all faults of all tars are told at once."""
    try:
        draft: Draft | UserError = _drafted(job)
    except UserError as error:
        draft = error
    job.drafts.write(draft, job.path.name)
    tick()


def _drafted(job: DraftJob) -> Draft:
    content = _Content(job.reading, job.classes)
    tar = index_one(job.path, wanted=content.wanted, visit=content.visit)
    content.check_sizes(job.path.name, tar)
    with_image = {key for key, row in tar.rows.items() if any(map(job.reading.is_image, row))}
    rows = {key: row for key, row in tar.rows.items() if key in with_image and job.reading.target in row}
    tally = _tally(job, [content.targets[key] for key in rows], list(rows))
    extensions = {extension for row in rows.values() for extension in row}
    scoped = {job.prefix + key: row for key, row in rows.items()}
    hashes = np.array([hash64(key.encode()) for key in scoped], np.uint64)
    index_sum = ""
    if rows:
        np.sort(hashes).tofile(job.drafts.hashes(job.path.name))
        index = make_shard_index(scoped, tally.labels)
        index_sum = write_shard_index(job.drafts.index(job.path.name), index)
    return Draft(
        name=job.path.name,
        samples=len(rows),
        bytes=tar.size,
        sha256=tar.sha256,
        index_sha256=index_sum,
        keys_digest=int(hashes.sum(dtype=np.uint64)) if rows else 0,
        names=tally.names,
        counts=tally.counts,
        given=tally.given,
        first=tally.first,
        pixels=tally.pixels,
        images=tuple(sorted(filter(job.reading.is_image, extensions))),
        ignored=tar.ignored,
        no_image=lacking([key for key in tar.rows if key not in with_image]),
        no_target=lacking([key for key, row in tar.rows.items() if job.reading.target not in row]),
    )


class _Content:
    """What the members of a tar hold, as far as it is looked into, by the samples' keys."""

    def __init__(self, reading: Reading, classes: tuple[str, ...]) -> None:
        self._reading, self._classes = reading, classes
        self.targets: dict[str, Any] = {}
        self._sizes: dict[str, dict[str, tuple[int, int]]] = {}

    def wanted(self, extension: str) -> int:
        """How many of the first bytes of a member with this extension are asked for."""
        if extension == self._reading.target:
            return MAX_PICTURE if self._reading.kind == "mask" else MAX_MEMBER + 1
        return PICTURE_HEADER if self._reading.kind == "mask" and self._reading.is_image(extension) else 0

    def visit(self, key: str, extension: str, data: bytes) -> None:
        """Take in a member; ValueError says what is wrong with a target."""
        kind = self._reading.kind
        if extension != self._reading.target:
            if (size := picture_size(data)) is not None:
                self._sizes.setdefault(key, {})[extension] = size
        elif kind == "mask":
            self.targets[key] = _mask_sums(data)
        elif kind in ("fields", "labels"):
            self.targets[key] = parse_labels(data, kind, self._reading.fields, self._classes)
        else:
            self.targets[key] = parse_class(data, kind, self._reading.fields, self._classes)

    def check_sizes(self, shard: str, tar: TarIndex) -> None:
        """A mask has the size of its image, as far as the image's can be read: the others `doctor` names."""
        for key, sizes in self._sizes.items():
            for extension, size in sizes.items():
                mask = self.targets.get(key)
                if mask is None or mask.size == size:
                    continue
                member = f"{key}.{self._reading.target}"
                shapes = [f"{width} x {height}" for height, width in (mask.size, size)]
                raise UserError(
                    f"'{shard}' mask {member!r} is {shapes[0]} pixels, its image .{extension} {shapes[1]}",
                    mend="give each mask the size of its image and write the tar again",
                    place={
                        "shard": shard,
                        "member": member,
                        "offset": tar.rows[key][self._reading.target][0],
                    },
                )


def picture_size(data: bytes) -> tuple[int, int] | None:
    """Height and width that a picture's header says; None where it cannot be read."""
    try:
        with PillowImage.open(io.BytesIO(data), formats=FORMATS) as picture:
            return picture.height, picture.width
    except Exception:  # whatever Pillow stumbles over: it is no header that says a size
        return None


def _mask_sums(data: bytes) -> MaskSums:
    try:
        mask = read_mask(data)
    except ValueError:
        raise
    except Exception as error:  # Pillow has no list of what it raises on a broken file
        raise ValueError(f"cannot decode: {first_line(error)}") from None
    pixels = np.bincount(mask.ravel(), minlength=256)
    values = np.flatnonzero(pixels)
    height, width = mask.shape
    return MaskSums((height, width), values, pixels[values])


class _Tally(NamedTuple):
    labels: NDArray[Any]  # numbered by `names`: int32 [R], int8 [R, N], or int8 [R, 0] of masks
    names: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    given: tuple[int, ...] = ()
    first: tuple[str, ...] = ()
    pixels: tuple[int, ...] = ()


def _tally(job: DraftJob, targets: list[Any], keys: list[str]) -> _Tally:
    if job.reading.task == "segmentation":
        sums = np.zeros(256, np.int64)
        for mask in targets:
            sums[mask.values] += mask.pixels
        return _Tally(np.zeros((len(targets), 0), np.int8), pixels=tuple(sums.tolist()))
    multiclass = job.reading.task == "multiclass"
    names = tuple(sorted(set(targets) if multiclass else {name for one in targets for name in one}))
    limit = max(MAX_CLASSES if multiclass else MAX_LABELS, len(job.classes))
    if len(names) > limit:
        raise too_many(job.path.name, len(names), limit)
    number = {name: place for place, name in enumerate(names)}
    if multiclass:
        labels = np.array([number[one] for one in targets], np.int32)
        counts = Counter(targets)
        first = dict(zip(reversed(targets), reversed(keys), strict=True))
        by_name = tuple(counts[name] for name in names)
        return _Tally(labels, names, by_name, by_name, tuple(first[name] for name in names))
    table = np.full((len(targets), len(names)), MISSING, np.int8)
    for row, one in enumerate(targets):
        if len(one) < len(names) and from_list(names):
            raise UserError(
                f"'{job.path.name}': sample {keys[row]!r} has a list of {len(one)} labels, not {len(names)}",
                mend="give every sample a list of all labels, null for a missing one",
                place={"shard": job.path.name, "member": keys[row]},
            )
        table[row, [number[name] for name in one]] = list(one.values())
    ones, given = (table == 1).sum(axis=0), (table != MISSING).sum(axis=0)
    return _Tally(table, names, tuple(ones.tolist()), tuple(given.tolist()))


def too_many(shard: str, count: int, limit: int) -> UserError:
    """More different labels than there can be classes."""
    return UserError(
        f"'{shard}' there are {count:,} different labels, at most {limit:,} can be classes: captions?",
        mend="name the member and field that hold labels: --target EXT, --field NAME",
        place={"shard": shard},
    )
