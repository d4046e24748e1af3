"""Cut a rectangle out of a picture and scale it, in one antialiased step, image and mask alike.

H W pixels, C channels. The functions of FRAMES draw where to cut from the picture's size alone, so that a
decoder may ask them before it decodes, and decode no more than it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from data_pipeline.batch import Image, Mask, Pixels
from data_pipeline.chance import below, between
from data_pipeline.fault import UserError

cv2.setNumThreads(1)  # reader workers are the parallelism; cv2's own threads would only take their cores

HALF = 2.0  # times smaller: beyond, three taps are too few
HARDLY = 0.01  # of a neighbour's weight: less blur than that is not seen, but costs as much
MOST_PIXELS = 100_000_000  # of a scaled picture: one of 1 x 20000 pixels would become one of a billion


class Frame(NamedTuple):
    """One crop and resize: a rectangle of the picture, in its pixels, and the size that it is scaled to."""

    top: float
    left: float
    height: float
    width: float
    out_height: int
    out_width: int


def resize(height: int, width: int, _draws: np.random.Generator, *, size: int) -> Frame:
    """Scale so that the shorter side has `size` pixels; DATA where the longer would have far too many."""
    scale = size / min(height, width)
    out_height, out_width = max(size, round(height * scale)), max(size, round(width * scale))
    if out_height * out_width > MOST_PIXELS:
        raise UserError(
            f"resize makes {out_height} x {out_width} pixels of a picture of {height} x {width}",
            mend="leave the picture out, or use resized_center_crop or random_resized_crop instead of resize",
        )
    return Frame(0, 0, height, width, out_height, out_width)


def resize_to(
    picture_height: int, picture_width: int, _draws: np.random.Generator, *, height: int, width: int
) -> Frame:
    """Scale to `height` x `width`, whatever the aspect."""
    return Frame(0, 0, picture_height, picture_width, height, width)


def resized_center_crop(
    height: int, width: int, _draws: np.random.Generator, *, size: int, shorter: int
) -> Frame:
    """Cut the central `size` x `size` pixels of the picture scaled to `shorter` pixels on its shorter side.

    The rectangle is rounded to whole pixels of the picture: each edge is at most half a pixel of it away from
    where `resize` and then `center_crop` would have it.
    """
    if size > shorter:
        raise UserError(
            f"resized_center_crop: no {size} x {size} pixels in a picture with a side of {shorter}",
            mend="make `shorter` at least `size`",
            code="CONFIG",
        )
    side = size * min(height, width) / shorter
    top, bottom = round((height - side) / 2), round((height + side) / 2)
    left, right = round((width - side) / 2), round((width + side) / 2)
    top, left = min(top, height - 1), min(left, width - 1)
    return Frame(top, left, max(1, bottom - top), max(1, right - left), size, size)


def random_resized_crop(
    height: int,
    width: int,
    draws: np.random.Generator,
    *,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Frame:
    """Cut a rectangle of random area and aspect, scaled to `size` x `size`.

    Source: Szegedy et al., Going Deeper with Convolutions (2015), as torchvision's RandomResizedCrop draws
    it: ten tries, then the largest central rectangle of an allowed aspect.
    """
    for _ in range(10):
        area = height * width * between(draws, *scale)
        aspect = math.exp(between(draws, math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = below(draws, height - crop_height + 1), below(draws, width - crop_width + 1)
            break
    else:
        crop_width = min(width, max(1, round(height * ratio[1])))
        crop_height = min(height, max(1, round(width / ratio[0])))
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return Frame(top, left, crop_height, crop_width, size, size)


FRAMES: dict[str, Callable[..., Frame]] = {
    "resize": resize,
    "resize_to": resize_to,
    "resized_center_crop": resized_center_crop,
    "random_resized_crop": random_resized_crop,
}


def cutting(frame_of: Callable[..., Frame]) -> Callable[..., Pixels]:
    """The transform that cuts what one of FRAMES says, with its name and parameters."""

    @wraps(frame_of)
    def transform(pixels: Pixels, draws: np.random.Generator, **parameters: object) -> Pixels:
        height, width = pixels.image.shape[:2]
        return cut(pixels, frame_of(height, width, draws, **parameters))

    return transform


def cut(pixels: Pixels, frame: Frame, out: Image | None = None) -> Pixels:
    """The frame's rectangle, rounded to whole pixels (at least one), at the frame's size.

    The mask takes the value of the nearest pixel, so that no class is made up. An image that needs no scaling
    is a view of the one given. With `out`, uint8 [out_height, out_width, C], the image is written there.
    """
    height, width = pixels.image.shape[:2]
    top, bottom = _edges(frame.top, frame.height, height)
    left, right = _edges(frame.left, frame.width, width)
    size = frame.out_height, frame.out_width
    image = _scaled(pixels.image[top:bottom, left:right], *size, out)
    if pixels.mask is None:
        return Pixels(image)
    return Pixels(image, _scaled_mask(pixels.mask[top:bottom, left:right], *size))


def _edges(start: float, length: float, limit: int) -> tuple[int, int]:
    first = min(max(round(start), 0), limit - 1)
    return first, min(max(round(start + length), first + 1), limit)


def _scaled(image: Image, height: int, width: int, out: Image | None) -> Image:
    """Antialiased to make smaller (cv2's linear alone is not), linear to make larger."""
    shape = (height, width, image.shape[2])
    assert out is None or (out.shape == shape and out.flags.c_contiguous), (out is None or out.shape, shape)
    if image.shape == shape:
        if out is None:
            return image
        np.copyto(out, image)
        return out
    rows, columns = min(image.shape[0], height), min(image.shape[1], width)
    # First what becomes smaller: where one side grows, cv2's area method averages neither and repeats pixels.
    if (rows, columns) != image.shape[:2]:
        last = out if (rows, columns) == (height, width) else None
        image = _shrunk(image, rows, columns, last)
    if (rows, columns) != (height, width):
        image = _resized(image, height, width, cv2.INTER_LINEAR, out)
    return image


def _shrunk(image: Image, height: int, width: int, out: Image | None) -> Image:
    """Smaller in at least one direction, larger in none.

    cv2's area averaging costs half as much as decoding, unless it is by whole numbers. Up to a half, a blur
    of three taps and then linear interpolation are as close to a triangle filter at half that cost.
    """
    down, across = image.shape[0] / height, image.shape[1] / width
    if max(down, across) > HALF:
        return _resized(image, height, width, cv2.INTER_AREA, out)
    taps_down, taps_across = _taps(down), _taps(across)
    if max(taps_down[0], taps_across[0]) > HARDLY:
        smooth = cv2.sepFilter2D(image, -1, taps_across, taps_down, borderType=cv2.BORDER_REPLICATE)
        image = np.asarray(smooth, np.uint8).reshape(image.shape)
    return _resized(image, height, width, cv2.INTER_LINEAR, out)


def _taps(scale: float) -> NDArray[np.float32]:
    """Weights of a pixel's neighbours and itself that widen linear interpolation to a triangle of `scale`.

    A triangle of half width s has the variance s^2 / 6, linear interpolation 1 / 6, these taps 2 a.
    """
    a = (scale * scale - 1) / 12
    return np.array([a, 1 - 2 * a, a], np.float32)


def _scaled_mask(mask: Mask, height: int, width: int) -> Mask:
    if mask.shape == (height, width):
        return mask
    # "Exact" takes the pixel under the centre of the new one, as the image does; plain nearest its corner.
    return _resized(mask, height, width, cv2.INTER_NEAREST_EXACT)


def _resized(
    array: NDArray[np.uint8], height: int, width: int, method: int, out: Image | None = None
) -> NDArray[np.uint8]:
    result = cv2.resize(array, (width, height), dst=out, interpolation=method)
    return np.asarray(result, np.uint8).reshape(height, width, *array.shape[2:])
