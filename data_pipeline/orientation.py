"""What makes a picture upright, by the orientation that its camera noted."""

from __future__ import annotations

import struct

from PIL import Image as PillowImage

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


def turn_of(picture: PillowImage.Image) -> PillowImage.Transpose | None:
    """What makes it upright, if anything must; ValueError where its tags are broken.

    Not ImageOps.exif_transpose, which fails where other tags are odd.
    """
    try:
        orientation = picture.getexif().get(EXIF_ORIENTATION)
    except (SyntaxError, struct.error) as error:
        raise ValueError(f"broken EXIF data: {error}") from None
    return UPRIGHT.get(orientation) if isinstance(orientation, int) else None
