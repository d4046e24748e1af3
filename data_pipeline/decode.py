"""Turns encoded pictures into uint8 arrays, and refuses what is broken, too large or not a picture.

JPEG goes to simplejpeg (libjpeg-turbo; releases the GIL), everything else to Pillow with the few formats
named below. H W pixels, C channels.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image as PillowImage

from data_pipeline.batch import Encoded, Image, RawSample
from data_pipeline.fault import UserError, first_line

# No other decoder of Pillow's is ever started, whatever a file's first bytes claim.
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 100_000_000  # by the header, before any pixel is decoded: a few kilobytes can announce gigabytes
PillowImage.MAX_IMAGE_PIXELS = None  # the limit above takes the place of Pillow's, which first only warns

# Of a picture's height and width in the file: how many times smaller it may be decoded, 1, 2, 4 or 8. It is
# asked again where one decoder gives up and another tries.
Reduction = Callable[[int, int], int]


class Decoded(NamedTuple):
    """A picture, and the height and width that it has in its file: larger where it was decoded reduced."""

    image: Image  # [H, W, C]
    height: int
    width: int


def decode_sample(raw: RawSample, *, mode: str) -> Image:
    """The picture of a sample, as `decode` gives it; DATA, with its place, where it cannot be decoded."""
    if raw.fault is not None:
        raise raw.fault
    try:
        return decode(raw.image, mode=mode)
    except ValueError as error:
        raise sample_fault(raw, error) from None


def sample_fault(raw: RawSample, error: Exception) -> UserError:
    """What is wrong with a sample, with its place."""
    where = f"'{raw.shard}': sample {raw.key!r}" if raw.shard else repr(raw.key)
    return UserError(
        f"{where}: {first_line(error)}",
        mend="mend it at its source and make the data set again; lockstep doctor lists all that are broken",
        place={"shard": raw.shard, "member": raw.key, "offset": raw.offset},
    )


def decode(data: Encoded, *, mode: str) -> Image:
    """Decode to uint8 [H, W, C], C = 1 for mode "L", 3 for "RGB"; ValueError says what is wrong."""
    return decode_reduced(data, lambda _height, _width: 1, mode=mode).image


def decode_reduced(data: Encoded, reduction: Reduction, *, mode: str) -> Decoded:
    """Decode as `decode`, a JPEG smaller by the power of two that `reduction` allows."""
    if data[:3] == b"\xff\xd8\xff":
        decoded = _decode_jpeg(data, reduction, mode)
        if decoded is not None:
            return decoded
    picture = open_picture(data)
    array = np.asarray(eight_bit(picture).convert(mode))
    image = array if array.ndim == 3 else array[:, :, None]
    reduction(*image.shape[:2])
    return Decoded(image, *image.shape[:2])


def open_picture(data: Encoded, *, formats: tuple[str, ...] = FORMATS) -> PillowImage.Image:
    """Open with Pillow under the limits above; ValueError where it is no picture, too large or broken off."""
    try:
        picture = PillowImage.open(io.BytesIO(data), formats=formats)
        _check_size(*picture.size)
        picture.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"cannot decode: {_without_address(error)}") from None
    return picture


def eight_bit(picture: PillowImage.Image) -> PillowImage.Image:
    """The same picture with 8 bits a channel: 16 bits are scaled down, floats by their maximum."""
    if not picture.mode.startswith("I") and picture.mode != "F":
        return picture
    with np.errstate(invalid="ignore"):  # a NaN that signals is a NaN like any other
        values = np.nan_to_num(np.asarray(picture, np.float64), posinf=0, neginf=0)
    scale = 255 / 65535 if picture.mode.startswith("I") else 255 / max(values.max(), 1e-12)
    return PillowImage.fromarray(np.clip(np.round(values * scale), 0, 255).astype(np.uint8))


def has_grey_palette(picture: PillowImage.Image) -> bool:
    """Whether its pixels are numbers of colours that are all grey."""
    if picture.mode != "P":
        return False
    colours = np.array(picture.getpalette() or [], np.int64).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


def _decode_jpeg(data: Encoded, reduction: Reduction, mode: str) -> Decoded | None:
    """None where simplejpeg declines (CMYK, broken off): Pillow then decodes it or names the fault."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height)
    if colours == "CMYK":
        return None
    by = reduction(height, width)
    # libjpeg has sizes in eighths; the smallest that is at least this is chosen.
    least = (-(-height // by), -(-width // by)) if by > 1 else (0, 0)
    try:
        image: Image = simplejpeg.decode_jpeg(
            data, colorspace="GRAY" if mode == "L" else "RGB", min_height=least[0], min_width=least[1]
        )
    except ValueError:
        return None
    return Decoded(image, height, width)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, at most {MAX_PIXELS} are decoded")


def _without_address(error: Exception) -> str:
    """The first line, without the buffer's address, which would differ from run to run."""
    return re.sub(r" <_io.BytesIO object[^>]*>", "", first_line(error))
