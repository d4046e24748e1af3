"""Turns encoded pictures into uint8 arrays, and refuses what is broken, too large or not a picture.

JPEG goes to simplejpeg (libjpeg-turbo; releases the GIL), everything else to Pillow with the few formats
named below.
"""

from __future__ import annotations

import io
import re

import numpy as np
import simplejpeg
from PIL import Image as PillowImage

from data_pipeline.batch import Image, RawSample
from data_pipeline.fault import UserError, first_line

# No other decoder of Pillow's is ever started, whatever a file's first bytes claim.
FORMATS = ("JPEG", "PNG", "WEBP")
EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 100_000_000  # by the header, before any pixel is decoded: a few kilobytes can announce gigabytes
PillowImage.MAX_IMAGE_PIXELS = None  # the limit above takes the place of Pillow's, which first only warns


def decode_sample(raw: RawSample, *, mode: str) -> Image:
    """The picture of a sample, as `decode` gives it; DATA, with its place, where it cannot be decoded."""
    encoded = next((raw.members[name] for name in EXTENSIONS if name in raw.members), b"")
    try:
        return decode(encoded, mode=mode)
    except ValueError as error:
        raise UserError(
            f"'{raw.shard}': sample {raw.key!r}: {error}",
            mend="mend the picture at its source and pack the data set again",
            place={"shard": raw.shard, "member": raw.key, "offset": raw.offset},
        ) from None


def decode(data: bytes, *, mode: str) -> Image:
    """Decode to uint8 [H, W, C], C = 1 for mode "L", 3 for "RGB"; ValueError says what is wrong."""
    if data[:3] == b"\xff\xd8\xff":
        image = _decode_jpeg(data, mode)
        if image is not None:
            return image
    with open_picture(data) as picture:
        array = np.asarray(picture.convert(mode))
    return array if array.ndim == 3 else array[:, :, None]


def open_picture(data: bytes, *, formats: tuple[str, ...] = FORMATS) -> PillowImage.Image:
    """Open with Pillow under the limits above; ValueError where it is no picture, too large or broken off."""
    try:
        picture = PillowImage.open(io.BytesIO(data), formats=formats)
        _check_size(*picture.size)
        picture.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"cannot decode: {_without_address(error)}") from None
    return picture


def _decode_jpeg(data: bytes, mode: str) -> Image | None:
    """None where simplejpeg declines (CMYK, broken off): Pillow then decodes it or names the fault."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        if colours == "CMYK":
            return None
        image: Image = simplejpeg.decode_jpeg(data, colorspace="GRAY" if mode == "L" else "RGB")
    except ValueError as error:
        if "pixels" in str(error):
            raise
        return None
    return image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, at most {MAX_PIXELS} are decoded")


def _without_address(error: Exception) -> str:
    """The first line, without the buffer's address, which would differ from run to run."""
    return re.sub(r" <_io.BytesIO object[^>]*>", "", first_line(error))
