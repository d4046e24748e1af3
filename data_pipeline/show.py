"""Shows a data set: one picture of many of its pictures, and how many there are of each class in each split.

Shapes: T thumbnails of the grid, N candidates that they are chosen from, H W pixels, C channels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont
from rich import box
from rich.filesize import decimal
from rich.table import Table

from data_pipeline.batch import Image, RawSample
from data_pipeline.decode import decode_sample
from data_pipeline.draws import IntArray
from data_pipeline.fault import UserError
from data_pipeline.index import DatasetIndex, Split
from data_pipeline.plan import Work
from data_pipeline.read import ShardReader
from data_pipeline.targets import target_reader

# Labels looked at for each thumbnail, so that rare classes are found and large splits are not read.
CANDIDATES = 25
CLASS_ROWS = 30  # of the table
SIDE, GAP, MARGIN, CAPTION, TITLE = 160, 14, 28, 24, 54  # pixels of the grid
INK, GREY, EDGE = (28, 28, 30), (120, 120, 126), (222, 222, 226)
MODES = {"L": "grey (L)", "RGB": "colour (RGB)"}


class Thumbnail(NamedTuple):
    """One cell of the grid."""

    picture: PillowImage.Image
    caption: str


def write_grid(root: Path, dataset: DatasetIndex, *, split: str, samples: int, out: Path) -> None:
    """Draw `samples` pictures of a split, all classes alike, into the PNG `out`; DATA for a damaged one."""
    thumbnails = read_thumbnails(root, dataset, split=split, samples=samples)
    total = dataset.split(split).samples
    details = f"{split}, {len(thumbnails):,} of {total:,} samples"
    shown = len({thumbnail.caption for thumbnail in thumbnails})
    grid = draw_grid(thumbnails, root.resolve().name, details, columns=columns_for(len(thumbnails), shown))
    try:
        grid.save(out, format="PNG")
    except OSError as error:
        raise UserError(
            f"cannot write '{out}': {error.strerror or error}",
            mend="name a file that can be written: --out FILE.png",
            code="USAGE",
        ) from None


def read_thumbnails(root: Path, dataset: DatasetIndex, *, split: str, samples: int) -> list[Thumbnail]:
    """The pictures to show, as training would read them, made small."""
    found = dataset.split(split)
    candidates = spread(found.samples, CANDIDATES * samples)
    work = Work(0, 0, 0, 1, candidates, valid=True)
    reader = ShardReader(root, found)
    try:
        labels = [_label(reader.read(int(number), work), dataset) for number in candidates]
        chosen = candidates[balanced(np.array(labels, np.int64), samples)]
        return [_thumbnail(reader.read(int(number), work), dataset) for number in chosen]
    finally:
        reader.close()


def spread(total: int, count: int) -> IntArray:
    """At most `count` numbers below `total` at even distances, int64."""
    count = min(count, total)
    return np.arange(count, dtype=np.int64) * total // max(count, 1)


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


def shrunk(image: Image) -> PillowImage.Image:
    """A picture [H, W, C] at the size of a thumbnail; tiny ones are enlarged in whole, visible pixels."""
    height, width, channels = image.shape
    picture = PillowImage.fromarray(image[:, :, 0] if channels == 1 else image).convert("RGB")
    scale = SIDE / max(height, width)
    if scale >= 4:
        return picture.resize((width * int(scale), height * int(scale)), PillowImage.Resampling.NEAREST)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return picture.resize(size, PillowImage.Resampling.LANCZOS)


def draw_grid(thumbnails: list[Thumbnail], name: str, details: str, *, columns: int) -> PillowImage.Image:
    """The thumbnails in rows on white, each above its caption, under one title line."""
    bold, plain, small = (
        _font("DejaVuSans-Bold.ttf", 20),
        _font("DejaVuSans.ttf", 17),
        _font("DejaVuSans.ttf", 13),
    )
    name = fitted(name, bold, 600)
    rows = -(-len(thumbnails) // columns)
    title_width = math.ceil(bold.getlength(name) + GAP + plain.getlength(details))
    width = max(columns * (SIDE + GAP) - GAP, title_width) + 2 * MARGIN
    height = TITLE + rows * (SIDE + CAPTION + GAP) - GAP + 2 * MARGIN
    grid = PillowImage.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(grid)
    draw.text((MARGIN, MARGIN + 20), name, INK, bold, anchor="ls")
    draw.text((MARGIN + bold.getlength(name) + GAP, MARGIN + 20), details, GREY, plain, anchor="ls")
    for cell, (picture, caption) in enumerate(thumbnails):
        left = MARGIN + cell % columns * (SIDE + GAP)
        top = MARGIN + TITLE + cell // columns * (SIDE + CAPTION + GAP)
        x, y = left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2
        draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=EDGE)
        grid.paste(picture, (x, y))
        middle, base = left + SIDE // 2, top + SIDE + CAPTION - 6
        draw.text((middle, base), fitted(caption, small, SIDE), INK, small, anchor="ms")
    return grid


def fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text on one line, with its middle left out where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    kept = min(len(text), width)  # no letter is narrower than a pixel
    while kept > 2:
        kept -= 1
        shorter = f"{text[: -(-kept // 2)]}…{text[len(text) - kept // 2 :]}"
        if font.getlength(shorter) <= width:
            return shorter
    return "…"


def class_table(dataset: DatasetIndex) -> Table:
    """Samples of each class in each split, the first CLASS_ROWS classes, and the totals."""
    counts = np.array([split.class_counts for split in dataset.splits.values()], np.int64).T
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    table.add_column("class", "total", overflow="ellipsis", no_wrap=True, max_width=48)
    for name, total in zip([*dataset.splits, "total"], _with_sum(counts.sum(axis=0)), strict=True):
        table.add_column(name, total, justify="right", no_wrap=True, min_width=max(len(name), len(total)))
    for name, row in zip(dataset.classes[:CLASS_ROWS], counts, strict=False):
        table.add_row(" ".join(name.split()), *_with_sum(row))
    if (more := len(dataset.classes) - CLASS_ROWS) > 0:
        table.add_row(f"... and {more:,} more classes", *_with_sum(counts[CLASS_ROWS:].sum(axis=0)))
    return table


def facts(dataset: DatasetIndex) -> list[str]:
    """What the table leaves out: the pictures' mode and statistics, and the tars of each split."""
    mean, std = (" ".join(f"{value:.3f}" for value in values) for values in (dataset.mean, dataset.std))
    pictures = f"pictures: {MODES[dataset.image_mode]}, mean {mean}, std {std}"
    return [pictures, *(f"{name}: {shards_in_words(split)}" for name, split in dataset.splits.items())]


def shards_in_words(split: Split) -> str:
    """Samples, tars and bytes of a split."""
    count, size = len(split.shards), sum(shard.bytes for shard in split.shards)
    return f"{counted(split.samples, 'sample')} in {counted(count, 'shard')}, {decimal(size)}"


def counted(count: int, one: str, more: str = "") -> str:
    """A number and its noun."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def _with_sum(row: IntArray) -> list[str]:
    return [f"{count:,}" for count in (*row.tolist(), int(row.sum()))]


def _label(raw: RawSample, dataset: DatasetIndex) -> int:
    return target_reader(dataset.task)(raw, len(dataset.classes))


def _thumbnail(raw: RawSample, dataset: DatasetIndex) -> Thumbnail:
    image = decode_sample(raw, mode=dataset.image_mode)
    return Thumbnail(shrunk(image), dataset.classes[_label(raw, dataset)])


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that comes with matplotlib: on every machine, and it knows Greek, Cyrillic and accents."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)
