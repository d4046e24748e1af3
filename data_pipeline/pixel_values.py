"""What counts of pixel values say: mean and deviation of pictures, and the classes of masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.fault import UserError
from data_pipeline.masks import IGNORED

MASK_CLASSES = 254  # numbers 0..253: 254 stands for "unknown", 255 for "ignored"
TWO_VALUES = ((0, 255), (0, 1))


class PixelClasses(NamedTuple):
    """The classes of a segmentation, and the value of each in the masks."""

    names: tuple[str, ...]
    values: tuple[int, ...]


def pixel_classes(named: tuple[str, ...], found: Sequence[int]) -> PixelClasses:
    """The classes of masks with the values `found`; 0 and 255, or 0 and 1, are background and foreground.

    Else the values are class numbers and 255 is of no class. DATA where they do not fit the names given.
    """
    for values in TWO_VALUES:
        if set(found) <= set(values) and len(named) in (0, 2):
            return PixelClasses(named or ("background", "foreground"), values)
    highest = max((value for value in found if value != IGNORED), default=0)
    if highest >= MASK_CLASSES:
        raise UserError(
            f"the masks hold {len(found)} different values, up to {highest}: more than {MASK_CLASSES} "
            "classes, or no masks at all",
            mend="save masks with 0 and 255 only, or as class numbers from 0 (255: ignored), as PNG, never "
            "resized with interpolation",
        )
    if named and (highest >= len(named) or set(found) == {0, IGNORED}):
        listed = ", ".join(map(str, found[:8])) + (f" … {found[-1]}" if len(found) > 8 else "")
        raise UserError(
            f"{len(named)} classes are named, but the masks hold the values {listed}",
            mend="name as many classes as there are (--classes), or save masks as class numbers from 0 to "
            f"{len(named) - 1} (255: ignored)",
        )
    numbers = range(len(named) or highest + 1)
    return PixelClasses(named or tuple(map(str, numbers)), tuple(numbers))


def moments(histogram: NDArray[np.int64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel of pixel values scaled to 0..1, from exact counts [channels, 256]."""
    values = np.arange(256) / 255
    weights = histogram / histogram.sum(axis=1, keepdims=True)
    mean = weights @ values
    std = np.sqrt(np.maximum(weights @ values**2 - mean**2, 0))
    return tuple(np.round(mean, 6).tolist()), tuple(np.round(np.maximum(std, 1e-3), 6).tolist())
