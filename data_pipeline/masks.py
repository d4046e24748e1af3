"""Reads a segmentation's masks: the raw value of every pixel, and the class that it stands for.

Shapes: H W pixels, C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_pipeline.batch import Encoded
from data_pipeline.decode import open_picture

MASK_FORMATS = ("PNG", "BMP", "TIFF", "PPM", "WEBP")  # JPEG blurs values: it can hold no mask
IGNORED = 255  # a pixel of no class: counts in no loss and no score
UNKNOWN = 254  # in a table of classes: a value that no class has


def read_mask(data: Encoded) -> NDArray[np.uint8]:
    """The raw value of every pixel, uint8 [H, W]; ValueError where it is no mask of at most 256 values.

    A palette's numbers are the values, not its colours; black and white count as 0 and 255.
    """
    picture = open_picture(data, formats=MASK_FORMATS)
    if picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode in ("RGB", "RGBA", "LA"):
        bands = picture.split()
        grey, others = bands[0], bands[1:3] if picture.mode.startswith("RGB") else ()
        if any(band.tobytes() != grey.tobytes() for band in others):
            raise ValueError("a mask in colours: its pixels must be class numbers or grey values")
        picture = grey
    if picture.mode not in ("L", "P") and not picture.mode.startswith("I"):
        raise ValueError(f"a mask of mode {picture.mode}: its pixels must be class numbers or grey values")
    values = np.asarray(picture)
    if values.size and (int(values.max()) > 255 or int(values.min()) < 0):
        raise ValueError(f"a mask with the value {int(values.max())}: the largest allowed is 255")
    return values.astype(np.uint8, copy=False)


def class_table(mask_values: tuple[int, ...]) -> NDArray[np.uint8]:
    """The class of each raw value, uint8 [256]; UNKNOWN where it has none, IGNORED for a free 255."""
    table = np.full(256, UNKNOWN, np.uint8)
    table[255] = IGNORED
    table[list(mask_values)] = np.arange(len(mask_values), dtype=np.uint8)
    return table


def mask_classes(values: NDArray[np.uint8], table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The class of every pixel, uint8 [H, W], IGNORED where it has none; ValueError for an unknown value."""
    classes: NDArray[np.uint8] = table[values]
    if bool((classes == UNKNOWN).any()):
        stranger = int(values[classes == UNKNOWN][0])
        allowed = ", ".join(map(str, np.flatnonzero(table != UNKNOWN)))
        raise ValueError(f"a mask with the value {stranger}, allowed are {allowed}")
    return classes
