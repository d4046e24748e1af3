"""Decides how a user's picture is stored: as it is, or upright and in 8 bits as PNG."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage

from data_pipeline.decode import FORMATS, open_picture

PACK_FORMATS = (*FORMATS, "BMP", "TIFF", "PPM")  # read at packing only, stored as PNG
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: PillowImage.Transpose.FLIP_LEFT_RIGHT,
    3: PillowImage.Transpose.ROTATE_180,
    4: PillowImage.Transpose.FLIP_TOP_BOTTOM,
    5: PillowImage.Transpose.TRANSPOSE,
    6: PillowImage.Transpose.ROTATE_270,
    7: PillowImage.Transpose.TRANSVERSE,
    8: PillowImage.Transpose.ROTATE_90,
}


def stored_picture(path: Path) -> tuple[str, bytes, PillowImage.Image]:
    """The extension and bytes to store, and the picture ("L" or "RGB"); ValueError where it cannot be read.

    A file is stored as it is where any reader shows it as we do. What readers disagree on (EXIF orientation,
    16 bits, CMYK) or do not know (BMP, TIFF) is stored upright, in 8 bits, as PNG.
    """
    data = path.read_bytes()
    picture = open_picture(data, formats=PACK_FORMATS)
    kind, turn = picture.format or "", _turn(picture)
    upright = picture if turn is None else picture.transpose(turn)
    shown = upright if upright.mode in ("L", "RGB") else _eight_bit(upright)
    if kind in FORMATS and turn is None and picture.mode in ("L", "RGB", "P", "RGBA", "LA", "1"):
        return {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind], data, shown
    encoded = io.BytesIO()
    shown.save(encoded, format="PNG", icc_profile=None)  # a CMYK profile, say, would not fit these pixels
    return "png", encoded.getvalue(), shown


def _turn(picture: PillowImage.Image) -> PillowImage.Transpose | None:
    """What makes it upright. Not ImageOps.exif_transpose, which fails where other tags are odd."""
    try:
        orientation = picture.getexif().get(EXIF_ORIENTATION)
    except (SyntaxError, struct.error) as error:
        raise ValueError(f"broken EXIF data: {error}") from None
    return UPRIGHT.get(orientation) if isinstance(orientation, int) else None


def _eight_bit(picture: PillowImage.Image) -> PillowImage.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, np.float64)
        scale = 255 / 65535 if picture.mode.startswith("I") else 255 / max(values.max(), 1e-12)
        return PillowImage.fromarray(np.clip(np.round(values * scale), 0, 255).astype(np.uint8))
    grey = picture.mode in ("1", "L", "LA") or (picture.mode == "P" and _grey_palette(picture))
    return picture.convert("L" if grey else "RGB")


def _grey_palette(picture: PillowImage.Image) -> bool:
    colours = np.array(picture.getpalette() or [], np.int64).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())
