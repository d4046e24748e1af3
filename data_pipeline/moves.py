"""Moves by whole pixels: flips, quarter turns, shifts, pads and crops of image and mask alike.

H W pixels, C channels. Nothing is interpolated. What comes into the picture from outside is `fill`, a grey
level of all channels, in the image and `mask_fill`, a class or IGNORED, in the mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from data_pipeline.batch import Pixels
from data_pipeline.chance import below, happens
from data_pipeline.masks import IGNORED

Array = NDArray[np.uint8]  # [H, W, C] or [H, W]


class Window(NamedTuple):
    """A rectangle, in pixels of the picture; it may reach beyond it."""

    top: int
    left: int
    height: int
    width: int


def horizontal_flip(pixels: Pixels, draws: np.random.Generator, *, probability: float = 0.5) -> Pixels:
    """Mirror left and right."""
    return _both(pixels, cv2.flip, 1) if happens(draws, probability) else pixels


def vertical_flip(pixels: Pixels, draws: np.random.Generator, *, probability: float = 0.5) -> Pixels:
    """Mirror top and bottom."""
    return _both(pixels, cv2.flip, 0) if happens(draws, probability) else pixels


def quarter_turn(pixels: Pixels, draws: np.random.Generator) -> Pixels:
    """Turn by 0, 90, 180 or 270 degrees, each as likely; 90 and 270 exchange height and width."""
    turns = below(draws, 4)
    codes = (cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)
    return _both(pixels, cv2.rotate, codes[turns - 1]) if turns else pixels


def random_shift(pixels: Pixels, draws: np.random.Generator, *, fraction: float) -> Pixels:
    """Move by up to `fraction` of each side; what moves in repeats the border, and is IGNORED in the mask."""
    height, width = pixels.image.shape[:2]
    reach_y, reach_x = int(height * fraction), int(width * fraction)
    top, left = below(draws, 2 * reach_y + 1) - reach_y, below(draws, 2 * reach_x + 1) - reach_x
    window = Window(top, left, height, width)
    image = _seen(pixels.image, window, None)
    return Pixels(image, None if pixels.mask is None else _seen(pixels.mask, window, IGNORED))


def center_crop(pixels: Pixels, _draws: np.random.Generator, *, size: int) -> Pixels:
    """Cut the central `size` x `size` pixels, with zeros around a smaller picture, IGNORED in the mask."""
    return seen(pixels, central_window(*pixels.image.shape[:2], size=size))


def central_window(height: int, width: int, *, size: int) -> Window:
    """What `center_crop` cuts from a picture of this size."""
    return Window(_central(height, size), _central(width, size), size, size)


def random_crop(
    pixels: Pixels,
    draws: np.random.Generator,
    *,
    size: int,
    padding: int = 0,
    fill: int = 0,
    mask_fill: int = IGNORED,
) -> Pixels:
    """Cut `size` x `size` pixels anywhere in the picture with a border of `padding` pixels around it.

    A picture that is smaller than that lies anywhere within what is cut.
    """
    height, width = pixels.image.shape[:2]
    top, left = (_anywhere(draws, side, size, padding) for side in (height, width))
    return seen(pixels, Window(top, left, size, size), fill, mask_fill)


def pad(
    pixels: Pixels,
    _draws: np.random.Generator,
    *,
    padding: int,
    fill: int = 0,
    mask_fill: int = IGNORED,
) -> Pixels:
    """Add a border of `padding` pixels on each side."""
    height, width = pixels.image.shape[:2]
    window = Window(-padding, -padding, height + 2 * padding, width + 2 * padding)
    return seen(pixels, window, fill, mask_fill)


def seen(pixels: Pixels, window: Window, fill: int = 0, mask_fill: int = IGNORED) -> Pixels:
    """What of a picture is seen through a window, and `fill` where there is none of it."""
    image = _seen(pixels.image, window, fill)
    return Pixels(image, None if pixels.mask is None else _seen(pixels.mask, window, mask_fill))


def _seen(array: Array, window: Window, fill: int | None) -> Array:
    """Without `fill`, the nearest pixel is repeated outside; a view where the window lies within."""
    rows, columns = array.shape[:2]
    first_row, last_row, above = _kept(window.top, window.height, rows)
    first_column, last_column, before = _kept(window.left, window.width, columns)
    kept = array[first_row : last_row + 1, first_column : last_column + 1]
    shape = (window.height, window.width, *array.shape[2:])
    outside = min(window.top + window.height, window.left + window.width) <= 0
    if fill is not None and (outside or window.top >= rows or window.left >= columns):
        return np.full(shape, fill, np.uint8)
    if kept.shape == shape:
        return kept
    under, after = window.height - kept.shape[0] - above, window.width - kept.shape[1] - before
    kind = cv2.BORDER_REPLICATE if fill is None else cv2.BORDER_CONSTANT
    value = (fill or 0,) * 4
    bordered = cv2.copyMakeBorder(kept, above, under, before, after, kind, value=value)
    return np.asarray(bordered, np.uint8).reshape(shape)


def _kept(start: int, length: int, side: int) -> tuple[int, int, int]:
    """First and last pixel of a side that are seen, never none, and how many are missing before them."""
    first, last = (min(max(at, 0), side - 1) for at in (start, start + length - 1))
    return first, last, min(max(-start, 0), length - (last - first + 1))


def _central(side: int, size: int) -> int:
    return (side - size) // 2 if side >= size else -((size - side) // 2)


def _anywhere(draws: np.random.Generator, side: int, size: int, padding: int) -> int:
    spare = side + 2 * padding - size
    return min(spare, 0) + below(draws, abs(spare) + 1) - padding


def _both(pixels: Pixels, change: Any, code: int) -> Pixels:
    channels = pixels.image.shape[2]
    image = change(pixels.image, code)
    mask = None if pixels.mask is None else change(pixels.mask, code)
    return Pixels(image.reshape(*image.shape[:2], channels), mask)
