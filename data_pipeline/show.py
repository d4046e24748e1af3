"""Shows a data set: one picture of many of its pictures, each with what it should be recognised as.

Shapes: T thumbnails of the grid, N candidates that they are chosen from, H W pixels, C channels or labels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.batch import RawSample
from data_pipeline.decode import decode_sample, sample_fault
from data_pipeline.draws import IntArray
from data_pipeline.fault import UserError
from data_pipeline.grid import Grid, Legend, Thumbnail, draw_grid, shrunk
from data_pipeline.index import DatasetIndex
from data_pipeline.masks import IGNORED, class_table, mask_classes, read_mask
from data_pipeline.overlay import IGNORED_COLOUR, class_colours, laid_over
from data_pipeline.read import ShardReader
from data_pipeline.shard_index import MISSING, read_shard_index
from data_pipeline.spread import spread
from data_pipeline.store import Folder, Opened, Store

# Labels looked at for each thumbnail, so that rare classes are found and large splits are not read.
CANDIDATES = 25
LEGEND = 12  # classes of pixels that are named


def write_grid(opened: Opened, *, split: str, samples: int, out: Path) -> None:
    """Draw `samples` pictures of a split, all classes alike, into the PNG `out`; DATA for a damaged one."""
    dataset, store = opened
    thumbnails = read_thumbnails(opened, split=split, samples=samples)
    total = dataset.split(split).samples
    details = f"{split}, {len(thumbnails):,} of {total:,} samples"
    single = dataset.task == "multiclass"
    shown = len({thumbnail.caption for thumbnail in thumbnails}) if single else 1
    columns = columns_for(len(thumbnails), shown)
    legend = legend_of(dataset, ignored=any(thumbnail.note for thumbnail in thumbnails))
    place = str(store.root.resolve()) if isinstance(store, Folder) else store.tars
    grid = draw_grid(Grid(Path(place).name, details, columns, legend), thumbnails)
    try:
        grid.save(out, format="PNG")
    except OSError as error:
        raise UserError(
            f"cannot write '{out}': {error.strerror or error}",
            mend="name a file that can be written: --out FILE.png",
            code="USAGE",
        ) from None


def read_thumbnails(opened: Opened, *, split: str, samples: int) -> list[Thumbnail]:
    """The pictures to show, as training would read them, made small."""
    dataset, store = opened
    candidates = spread(dataset.split(split).samples, CANDIDATES * samples)
    if dataset.task == "segmentation":
        chosen = spread(len(candidates), samples)
    else:
        chosen = balanced(_groups(store, dataset, split, candidates), samples)
    reader = ShardReader(store, dataset, split)
    try:
        return [_thumbnail(reader.read(int(number)), dataset) for number in candidates[chosen]]
    finally:
        reader.close()


def _groups(store: Store, dataset: DatasetIndex, split: str, numbers: IntArray) -> IntArray:
    """The class of each sample [N]; of several labels the rarest that it has, of none their number."""
    found = dataset.split(split)
    ends = np.cumsum(found.shard_samples)
    positions = np.searchsorted(ends, numbers, side="right")
    groups: list[IntArray] = []
    for position in np.unique(positions):
        shard = found.shards[position]
        rows = numbers[positions == position] - (int(ends[position]) - shard.samples)
        labels = np.asarray(read_shard_index(store.index_path(shard), shard).labels[rows])
        if labels.ndim == 2:
            rarity = np.where(labels == 1, np.array(found.class_counts), np.iinfo(np.int64).max)
            labels = np.where((labels == 1).any(axis=1), rarity.argmin(axis=1), labels.shape[1])
        groups.append(labels.astype(np.int64))
    return np.concatenate([np.empty(0, np.int64), *groups])


def balanced(labels: IntArray, count: int) -> IntArray:
    """Rows of `labels` [N] to show, int64 [T]: the first of each class, then the second of each, and so on.

    Where there are more classes than that, one of every so many classes.
    """
    by_class = np.argsort(labels, kind="stable")
    ordered = labels[by_class]
    turn = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    in_turns: IntArray = by_class[np.lexsort((ordered, turn))]
    classes = int((turn == 0).sum())
    return in_turns[spread(classes, count)] if classes > count else in_turns[:count]


def columns_for(count: int, classes: int) -> int:
    """About 8 to 5 as wide as high, and whole rounds of the classes to a row where they are few."""
    wide = math.ceil(math.sqrt(count * 1.6))
    whole_rounds = math.ceil(wide / classes) * classes
    if whole_rounds > max(wide, 12):
        whole_rounds -= classes
    return min(count, whole_rounds or wide)


def legend_of(dataset: DatasetIndex, *, ignored: bool) -> Legend:
    """The colours of a segmentation's classes; of other tasks nothing."""
    if dataset.task != "segmentation":
        return []
    colours = class_colours(dataset)
    named = [(dataset.classes[number], colour) for number, colour in colours.items()][:LEGEND]
    more = [(f"and {len(colours) - LEGEND} more", None)] if len(colours) > LEGEND else []
    return [*named, *more, *([("of no class", IGNORED_COLOUR)] if ignored else [])]


def _thumbnail(raw: RawSample, dataset: DatasetIndex) -> Thumbnail:
    image = decode_sample(raw, mode=dataset.image_mode)
    picture = shrunk(image)
    if dataset.task == "multiclass":
        return Thumbnail(picture, dataset.classes[_class_of(raw, dataset)])
    if dataset.task == "multilabel":
        return Thumbnail(picture, *labels_in_words(raw.label, dataset.classes))
    assert raw.mask is not None
    try:
        classes = mask_classes(read_mask(raw.mask), class_table(dataset.mask_values))
        if classes.shape != image.shape[:2]:
            raise ValueError(f"its mask is {classes.shape[1]} x {classes.shape[0]} pixels, it is not")
    except ValueError as error:
        raise sample_fault(raw, error) from None
    return Thumbnail(
        laid_over(picture, classes, class_colours(dataset)), *shares_in_words(classes, dataset.classes)
    )


def _class_of(raw: RawSample, dataset: DatasetIndex) -> int:
    if not 0 <= raw.label < len(dataset.classes):
        raise sample_fault(raw, ValueError(f"class {raw.label}, allowed are 0 to {len(dataset.classes) - 1}"))
    return int(raw.label)


def labels_in_words(labels: Any, names: tuple[str, ...]) -> tuple[str, str]:
    """The labels that a sample has, and a note on those that are missing."""
    ones = [name for name, label in zip(names, labels, strict=True) if label == 1]
    missing = [name for name, label in zip(names, labels, strict=True) if label == MISSING]
    note = (
        f"missing: {', '.join(missing)}" if len(missing) < 3 else f"missing: {len(missing)} of {len(names)}"
    )
    return ", ".join(ones) or "none", note if missing else ""


def shares_in_words(classes: Any, names: tuple[str, ...]) -> tuple[str, str]:
    """The largest classes of a mask but the first, in percent of its pixels, and a note on what has none."""
    counts = np.bincount(classes.ravel(), minlength=256)
    shares = counts / max(classes.size, 1)
    order = [number for number in np.argsort(-shares[: len(names)], kind="stable").tolist() if counts[number]]
    inner = [number for number in order if number] or order
    note = f"of no class: {_percent(shares[IGNORED])}" if counts[IGNORED] and len(names) <= IGNORED else ""
    return ", ".join(f"{names[number]}: {_percent(shares[number])}" for number in inner[:3]), note


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"
