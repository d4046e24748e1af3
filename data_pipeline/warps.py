"""Turns, stretches and waves: every pixel is read from between others, image and mask alike.

H W pixels, C channels. The image is interpolated linearly, the mask takes the nearest pixel's class. What
comes into the picture from outside is `fill`, a grey level of all channels, and `mask_fill`, a class or
IGNORED, in the mask.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from data_pipeline.batch import Pixels
from data_pipeline.chance import between, happens, noise
from data_pipeline.fault import UserError
from data_pipeline.masks import IGNORED

LONGEST = 32_000  # pixels of a side: cv2 keeps coordinates in 16 bits
FINEST = 2.0  # of a field of displacements: standard deviation of its Gaussian, in points of its grid

NO_MAP: Any = None  # cv2 takes x and y in one array or in two, which its types do not know

Range = tuple[float, float]


class Linear(NamedTuple):
    """Where pixel (x, y) of the result is read: at (xx x + xy y, yx x + yy y), from the picture's centre."""

    xx: float
    xy: float
    yx: float
    yy: float


def rotation(
    pixels: Pixels,
    draws: np.random.Generator,
    *,
    degrees: float | Range,
    fill: int = 0,
    mask_fill: int = IGNORED,
    probability: float = 1.0,
) -> Pixels:
    """Turn about the centre, counter-clockwise, by an angle of the range or of -degrees to degrees."""
    if not happens(draws, probability):
        return pixels
    angle = between(draws, *_range(degrees))
    return warped(pixels, turn(-angle), fill=fill, mask_fill=mask_fill)


def affine(
    pixels: Pixels,
    draws: np.random.Generator,
    *,
    degrees: float | Range = 0.0,
    translate: Range = (0.0, 0.0),
    scale: Range = (1.0, 1.0),
    shear: float | Range = 0.0,
    fill: int = 0,
    mask_fill: int = IGNORED,
    probability: float = 1.0,
) -> Pixels:
    """Turn (clockwise), move, scale and shear at once, as torchvision's RandomAffine draws and orders it.

    `translate`: largest move in shares of width and height; `shear`: along the x axis, degrees.
    """
    if not happens(draws, probability):
        return pixels
    height, width = pixels.image.shape[:2]
    angle = between(draws, *_range(degrees))
    right = round(between(draws, -translate[0] * width, translate[0] * width))
    down = round(between(draws, -translate[1] * height, translate[1] * height))
    factor = between(draws, *scale)
    slant = math.tan(math.radians(between(draws, *_range(shear))))
    plain = turn(angle)
    # Backwards: undo the turn, then the shear (x + slant * y), then the scale.
    inverse = Linear(
        (plain.xx + slant * plain.yx) / factor,
        (plain.xy + slant * plain.yy) / factor,
        plain.yx / factor,
        plain.yy / factor,
    )
    return warped(pixels, inverse, moved=(right, down), fill=fill, mask_fill=mask_fill)


def elastic(
    pixels: Pixels,
    draws: np.random.Generator,
    *,
    alpha: float = 50.0,
    sigma: float = 5.0,
    fill: int = 0,
    mask_fill: int = IGNORED,
    probability: float = 1.0,
) -> Pixels:
    """Displace every pixel by a smooth random field: uniform noise, blurred by a Gaussian of `sigma` pixels.

    `alpha` is its strength in torchvision's measure: the noise has an amplitude of alpha / 2 pixels before it
    is blurred (50 and 5 displace by 0.8 pixels, root mean square).
    Source: Simard et al., Best Practices for Convolutional Neural Networks (ICDAR 2003).
    """
    if not happens(draws, probability):
        return pixels
    _check_sides(pixels)
    height, width = pixels.image.shape[:2]
    field = _field(draws, height, width, sigma) * np.float32(alpha / 2)
    field[..., 0] += np.arange(width, dtype=np.float32)
    field[..., 1] += np.arange(height, dtype=np.float32)[:, None]
    return displaced(pixels, field, fill=fill, mask_fill=mask_fill)


def turn(clockwise: float) -> Linear:
    """The way back of a turn by so many degrees."""
    cosine, sine = math.cos(math.radians(clockwise)), math.sin(math.radians(clockwise))
    return Linear(cosine, sine, -sine, cosine)


def warped(
    pixels: Pixels,
    inverse: Linear,
    *,
    moved: tuple[float, float] = (0.0, 0.0),
    fill: int = 0,
    mask_fill: int = IGNORED,
) -> Pixels:
    """Read every pixel from where `inverse` says, and move the result by so many pixels right and down."""
    _check_sides(pixels)
    height, width = pixels.image.shape[:2]
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    from_x, from_y = middle_x + moved[0], middle_y + moved[1]
    matrix = np.array(
        [
            [inverse.xx, inverse.xy, middle_x - inverse.xx * from_x - inverse.xy * from_y],
            [inverse.yx, inverse.yy, middle_y - inverse.yx * from_x - inverse.yy * from_y],
        ]
    )

    def read(array: NDArray[np.uint8], method: int, value: int) -> NDArray[np.uint8]:
        flags = method | cv2.WARP_INVERSE_MAP
        result = cv2.warpAffine(array, matrix, (width, height), flags=flags, borderValue=(value,) * 4)
        return np.asarray(result, np.uint8).reshape(array.shape)

    mask = None if pixels.mask is None else read(pixels.mask, cv2.INTER_NEAREST, mask_fill)
    return Pixels(read(pixels.image, cv2.INTER_LINEAR, fill), mask)


def displaced(
    pixels: Pixels, source: NDArray[np.float32], *, fill: int = 0, mask_fill: int = IGNORED
) -> Pixels:
    """Read every pixel from `source`, float32 [H, W, 2]: its x and y in the picture."""

    def read(array: NDArray[np.uint8], method: int, value: int) -> NDArray[np.uint8]:
        result = cv2.remap(array, source, NO_MAP, method, borderValue=(value,) * 4)
        return np.asarray(result, np.uint8).reshape(array.shape)

    mask = None if pixels.mask is None else read(pixels.mask, cv2.INTER_NEAREST, mask_fill)
    return Pixels(read(pixels.image, cv2.INTER_LINEAR, fill), mask)


def _field(draws: np.random.Generator, height: int, width: int, sigma: float) -> NDArray[np.float32]:
    """Uniform noise from -1 to 1 under a Gaussian of `sigma` pixels, float32 [H, W, 2].

    A wide Gaussian's field is made on a coarser grid: fewer points of noise, each as weak as the mean of
    those that it stands for, under a Gaussian narrower by what the linear interpolation of the grid blurs.
    """
    step = max(1, int(sigma / FINEST))
    rows, columns = -(-height // step), -(-width // step)
    levels = noise(draws, rows * columns * 2).reshape(rows, columns, 2)
    field = (levels.astype(np.float32) - 127.5) / (127.5 * step)
    narrowed = math.sqrt((sigma / step) ** 2 - (1 / 6 if step > 1 else 0))
    taps = 2 * math.ceil(4 * narrowed) + 1
    field = np.asarray(cv2.GaussianBlur(field, (taps, taps), narrowed), np.float32)
    if step == 1:
        return field
    return np.asarray(cv2.resize(field, (columns * step, rows * step)), np.float32)[:height, :width]


def _range(limit: float | Range) -> Range:
    return (-limit, limit) if isinstance(limit, int | float) else limit


def _check_sides(pixels: Pixels) -> None:
    height, width = pixels.image.shape[:2]
    if max(height, width) > LONGEST:
        raise UserError(
            f"a picture of {height} x {width} pixels: sides of at most {LONGEST} can be turned or displaced",
            mend="scale or crop it first, or leave it out",
        )
