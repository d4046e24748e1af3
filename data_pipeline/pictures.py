"""Decides how a user's picture or mask is stored: as it is, or upright, in 8 bits, smaller, baseline.

| a file | is shown and stored |
|---|---|
| JPEG, PNG, WebP of 8 bits, grey, coloured or a palette | as it is, byte for byte, without transparency |
| black and white | as it is, 0 and 255 |
| EXIF orientation | upright |
| 16 bits, grey | round(value x 255 / 65535) |
| 16 bits, coloured | the high byte of each value, which is what Pillow reads |
| floating point, grey | round(value x 255 / largest value), what is below 0 or no number as 0 |
| CMYK | RGB as Pillow converts it, without the profile |
| an animation (WebP, PNG), a photograph with others behind it (MPO) | its first picture |
| several pictures of one size in a TIFF | refused: all but one would be lost |
| BMP, TIFF, PPM | as it is shown, as PNG |
"""

from __future__ import annotations

import io
import os
import stat
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from data_pipeline.decode import FORMATS, eight_bit, has_grey_palette, open_picture
from data_pipeline.fault import first_line
from data_pipeline.masks import MASK_FORMATS, read_mask
from data_pipeline.orientation import turn_of

PACK_FORMATS = (*FORMATS, "BMP", "TIFF", "PPM")  # read at packing only, stored as PNG
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
PLAIN_MODES = ("L", "RGB", "P", "RGBA", "LA", "1")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_TAGS = (b"eXIf", b"Raw profile type exif")
MAX_BYTES = 1 << 30  # of a file: larger than any picture of the most pixels that are decoded
# What Pillow's readers raise on broken files besides OSError, SyntaxError and ValueError.
BROKEN = (struct.error, LookupError, TypeError, ArithmeticError, EOFError, MemoryError)

Size = tuple[int, int]  # width, height


class Stored(NamedTuple):
    """The bytes to store with their extension, and the picture they show ("L" or "RGB").

    `size` is that of the upright picture before it was scaled, and `turn` what made it upright.
    """

    extension: str
    data: bytes
    shown: PillowImage.Image
    progressive: bool  # whether the bytes are a progressive JPEG, which is slow to decode
    size: Size
    turn: PillowImage.Transpose | None


class StoredMask(NamedTuple):
    """The PNG to store, and how many pixels have each raw value, int64 [256]."""

    data: bytes
    values: NDArray[np.int64]


def stored_picture(
    path: Path, *, resize_shorter: int | None = None, reencode: bool = False, quality: int = 90
) -> Stored:
    """How a picture is stored, by the table above; ValueError or OSError where it cannot be read.

    A file is kept as it is where any reader shows it as we do. One whose shorter side has more than
    `resize_shorter` pixels is made smaller; `reencode` makes a progressive JPEG baseline. What was a JPEG and
    is not kept is a baseline JPEG of `quality` if either is asked for; all else is a PNG.
    """
    data = _read(path)
    picture = _opened(data)
    kind, turn = picture.format or "", turn_of(picture)
    done = turn_of(_header(data)) if kind == "TIFF" else turn
    progressive = bool(picture.info.get("progressive"))
    kept = turn is None and _is_plain(picture, data)
    upright = picture if turn is None else picture.transpose(turn)
    shown = upright if upright.mode in ("L", "RGB") else _eight_bit(upright)
    size = shown.size
    smaller = scaled_size(size, resize_shorter)
    if kept and smaller == size and not (reencode and progressive):
        return Stored(EXTENSIONS[kind], data, shown, progressive, size, done)
    if smaller != size:
        shown = shown.resize(smaller, PillowImage.Resampling.LANCZOS, reducing_gap=3.0)
    if EXTENSIONS.get(kind) == "jpg" and (reencode or smaller != size):
        return Stored("jpg", _jpeg(shown, quality), shown, False, size, done)
    return Stored("png", _png(shown), shown, False, size, done)


def picture_bytes(path: Path) -> bytes:
    """The bytes that `stored_picture` stores of a file as it is, without decoding what it keeps.

    So a broken JPEG, PNG or WebP may pass: whoever decodes it finds out. Errors as of `stored_picture`.
    """
    data = _read(path)
    try:
        kept = _own_turn(data) is None and _is_plain(_header(data), data)
    except (OSError, SyntaxError, ValueError, *BROKEN):
        kept = False  # then it is read as a whole, and the error is the one that packing would name
    return data if kept else stored_picture(path).data


def stored_mask(
    path: Path, *, size: Size, resize_shorter: int | None, turn: PillowImage.Transpose | None = None
) -> StoredMask:
    """How the mask of a picture is stored, by that picture's `size` and `turn` (see `Stored`).

    A mask of the size that the picture had before it was turned is turned alike. ValueError where it is of
    another size or no mask. A grey or palette PNG that stays as large and as it lies is kept byte for byte;
    scaling takes the nearest pixel, so that no value is made up.
    """
    data = _read(path)
    try:
        values = read_mask(data)
        own = _own_turn(data)
    except BROKEN as error:
        raise ValueError(f"cannot decode: {first_line(error)}") from None
    mask = PillowImage.fromarray(values)
    if own is None and mask.size != size:
        own = turn
    upright = mask if own is None else mask.transpose(own)
    if upright.size != size:
        raise ValueError(f"a mask of {_in_words(mask.size)} pixels for a picture of {_in_words(size)}")
    smaller = scaled_size(size, resize_shorter)
    if smaller != size:
        upright = upright.resize(smaller, PillowImage.Resampling.NEAREST)
    elif own is None and _is_plain_png(data):
        return StoredMask(data, _counts(upright))
    return StoredMask(_png(upright), _counts(upright))


def scaled_size(size: Size, resize_shorter: int | None) -> Size:
    """The size at which the shorter side has at most `resize_shorter` pixels; never a larger one."""
    shorter = min(size)
    if resize_shorter is None or shorter <= resize_shorter:
        return size
    width, height = (max(1, round(side * resize_shorter / shorter)) for side in size)
    return width, height


def _read(path: Path) -> bytes:
    """The bytes of a regular file: a pipe would keep us waiting, a device never end."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("no regular file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"a file of {status.st_size:,} bytes, at most {MAX_BYTES:,} are read")
        return file.read()


def _opened(data: bytes) -> PillowImage.Image:
    try:
        picture = open_picture(data, formats=PACK_FORMATS)
        pages = _pages(data) if picture.format == "TIFF" else 1
    except BROKEN as error:
        raise ValueError(f"cannot decode: {first_line(error)}") from None
    if pages > 1:
        raise ValueError(f"{pages} pictures in one TIFF: save each as a file of its own")
    return picture


def _header(data: bytes) -> PillowImage.Image:
    """Of a picture that could be read: its format, mode and tags, before any pixel is decoded."""
    return PillowImage.open(io.BytesIO(data), formats=(*PACK_FORMATS, *MASK_FORMATS))


def _pages(data: bytes) -> int:
    """How many pictures a TIFF holds; one where the second is of another size: a thumbnail, most likely."""
    picture = _header(data)
    pages, size = getattr(picture, "n_frames", 1), picture.size
    if pages > 1:
        picture.seek(1)
    return pages if picture.size == size else 1


def _sixteen_bits(data: bytes) -> bool:
    """Whether a PNG has 16 bits a channel: of a coloured one Pillow's mode does not tell."""
    return data[:8] == PNG_MAGIC and data[24] == 16


def _is_plain(picture: PillowImage.Image, data: bytes) -> bool:
    """Whether any reader shows an upright picture as we do."""
    one = picture.format == "MPO" or getattr(picture, "n_frames", 1) == 1
    return picture.format in EXTENSIONS and picture.mode in PLAIN_MODES and one and not _sixteen_bits(data)


def _is_plain_png(data: bytes) -> bool:
    """Whether any reader finds a mask's raw values in these bytes."""
    return data[:8] == PNG_MAGIC and _header(data).mode in ("L", "P", "1")


def _own_turn(data: bytes) -> PillowImage.Transpose | None:
    """What makes a mask upright by its own tags. Pillow turns a TIFF while it loads; PNG tags are rare."""
    header = _header(data)
    if header.format == "TIFF":
        header.load()
    elif header.format == "PNG" and not any(tag in data for tag in PNG_TAGS):
        return None  # looking for them would decode all pixels once more
    return turn_of(header)


def _eight_bit(picture: PillowImage.Image) -> PillowImage.Image:
    picture = eight_bit(picture)
    grey = picture.mode in ("1", "L", "LA") or has_grey_palette(picture)
    return picture.convert("L" if grey else "RGB")


def _jpeg(picture: PillowImage.Image, quality: int) -> bytes:
    return _encoded(picture, format="JPEG", quality=quality, subsampling="4:2:0", optimize=True)


def _png(picture: PillowImage.Image) -> bytes:
    return _encoded(picture, format="PNG")


def _encoded(picture: PillowImage.Image, **how: Any) -> bytes:
    """Nothing but pixels: a CMYK profile or a transparent colour, say, would not fit what they became."""
    plain = PillowImage.frombytes(picture.mode, picture.size, picture.tobytes())
    encoded = io.BytesIO()
    plain.save(encoded, **how)
    return encoded.getvalue()


def _counts(mask: PillowImage.Image) -> NDArray[np.int64]:
    return np.array(mask.histogram(), np.int64)


def _in_words(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
