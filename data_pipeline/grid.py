"""Draws thumbnails in rows on white, each above its caption, under a title and a legend."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from data_pipeline.batch import Image

SIDE, GAP, MARGIN, CAPTION, TITLE = 160, 14, 28, 24, 54  # pixels
NOTE, LEGEND_LINE, SWATCH = 17, 26, 14
INK, GREY, EDGE = (28, 28, 30), (120, 120, 126), (222, 222, 226)

Legend = list[tuple[str, tuple[int, int, int] | None]]  # names, and the colour of each


class Thumbnail(NamedTuple):
    """One cell of the grid; the note is a second, paler line."""

    picture: PillowImage.Image
    caption: str
    note: str = ""


class Grid(NamedTuple):
    """What stands around the thumbnails: a name and details above them, and how many are in a row."""

    name: str
    details: str
    columns: int
    legend: Legend


def shrunk(image: Image) -> PillowImage.Image:
    """A picture [H, W, C] at the size of a thumbnail; tiny ones are enlarged in whole, visible pixels."""
    height, width, channels = image.shape
    picture = PillowImage.fromarray(image[:, :, 0] if channels == 1 else image).convert("RGB")
    scale = SIDE / max(height, width)
    if scale >= 4:
        return picture.resize((width * int(scale), height * int(scale)), PillowImage.Resampling.NEAREST)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return picture.resize(size, PillowImage.Resampling.LANCZOS)


def draw_grid(grid: Grid, thumbnails: list[Thumbnail]) -> PillowImage.Image:
    """The whole picture; one row or many."""
    bold, plain = font("DejaVuSans-Bold.ttf", 20), font("DejaVuSans.ttf", 17)
    name = fitted(grid.name, bold, 600)
    caption = CAPTION + (NOTE if any(one.note for one in thumbnails) else 0)
    title = bold.getlength(name) + GAP + plain.getlength(grid.details)
    inside = max(grid.columns * (SIDE + GAP) - GAP, math.ceil(title))
    lines = legend_lines(grid.legend, inside)
    top = MARGIN + TITLE + LEGEND_LINE * len(lines)
    rows = -(-len(thumbnails) // grid.columns)
    canvas = PillowImage.new(
        "RGB", (inside + 2 * MARGIN, top + rows * (SIDE + caption + GAP) - GAP + MARGIN), "white"
    )
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN + 20), name, INK, bold, anchor="ls")
    draw.text((MARGIN + bold.getlength(name) + GAP, MARGIN + 20), grid.details, GREY, plain, anchor="ls")
    for line, entries in enumerate(lines):
        _draw_legend(draw, entries, MARGIN + TITLE - 12 + line * LEGEND_LINE)
    for cell, thumbnail in enumerate(thumbnails):
        left = MARGIN + cell % grid.columns * (SIDE + GAP)
        _draw_cell(canvas, draw, thumbnail, (left, top + cell // grid.columns * (SIDE + caption + GAP)))
    return canvas


def _draw_cell(
    canvas: PillowImage.Image, draw: ImageDraw.ImageDraw, thumbnail: Thumbnail, corner: tuple[int, int]
) -> None:
    picture, (left, top) = thumbnail.picture, corner
    small = font("DejaVuSans.ttf", 13)
    x, y = left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2
    draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=EDGE)
    canvas.paste(picture, (x, y))
    middle, base = left + SIDE // 2, top + SIDE + CAPTION - 6
    draw.text((middle, base), fitted(thumbnail.caption, small, SIDE), INK, small, anchor="ms")
    if thumbnail.note:
        smaller = font("DejaVuSans.ttf", 12)
        draw.text((middle, base + NOTE), fitted(thumbnail.note, smaller, SIDE), GREY, smaller, anchor="ms")


def legend_lines(legend: Legend, width: int) -> list[Legend]:
    """The entries of a legend in lines of at most `width` pixels."""
    lines: list[Legend] = []
    left = 0
    for entry in legend:
        needed = _entry_width(entry[0])
        if not lines or left + needed > width:
            lines.append([])
            left = 0
        lines[-1].append(entry)
        left += needed
    return lines


def _entry_width(name: str) -> int:
    small = font("DejaVuSans.ttf", 13)
    return math.ceil(small.getlength(fitted(name, small, SIDE))) + SWATCH + 6 + 20


def _draw_legend(draw: ImageDraw.ImageDraw, entries: Legend, top: int) -> None:
    small, left = font("DejaVuSans.ttf", 13), MARGIN
    for name, colour in entries:
        if colour is not None:
            draw.rectangle((left, top, left + SWATCH, top + SWATCH), fill=colour)
        draw.text((left + SWATCH + 6, top + SWATCH - 2), fitted(name, small, SIDE), INK, small, anchor="ls")
        left += _entry_width(name)


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


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that comes with matplotlib: on every machine, and it knows Greek, Cyrillic and accents."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)
