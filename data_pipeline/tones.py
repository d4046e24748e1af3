"""What can be done to an image's colours and sharpness: pure functions of uint8 images.

H W pixels, C channels: 3 (red, green, blue) or 1 (grey), for which what is about colours does nothing. Within
two grey levels of torchvision.transforms.v2.functional (for factors up to 2), which cuts off decimals where
cv2 rounds.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from data_pipeline.batch import Image

LEVELS = np.arange(256, dtype=np.float32)[:, None]
LUMA = np.array([0.2989, 0.587, 0.114])  # shares of red, green and blue in grey, ITU-R BT.601


def brightness(image: Image, factor: float) -> Image:
    """Every level times `factor`: 0 is black, 1 changes nothing."""
    return np.asarray(cv2.convertScaleAbs(image, alpha=factor), np.uint8).reshape(image.shape)


def contrast(image: Image, factor: float) -> Image:
    """Every level's distance from the mean grey times `factor`: 0 is all grey."""
    means = channel_means(image)
    mean = means[0] if len(means) == 1 else float(LUMA @ means)
    scaling = np.eye(len(means), len(means) + 1) * factor
    scaling[:, -1] = mean * (1 - factor)
    return np.asarray(cv2.transform(image, scaling), np.uint8).reshape(image.shape)


def saturation(image: Image, factor: float) -> Image:
    """Every colour's distance from its own grey times `factor`: 0 is a grey image."""
    if image.shape[2] == 1:
        return image
    mixing = np.eye(3) * factor + (1 - factor) * LUMA
    return np.asarray(cv2.transform(image, mixing), np.uint8)


def hue(image: Image, turn: float) -> Image:
    """Every colour `turn` further on the circle of hues: 1 is once around."""
    if image.shape[2] == 1:
        return image
    # Not in cv2's 8 bits: 256 hues are six levels apart in a saturated colour.
    colours = np.asarray(cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV), np.float32)
    colours[..., 0] += 360 * (turn % 1)
    return np.asarray(cv2.convertScaleAbs(cv2.cvtColor(colours, cv2.COLOR_HSV2RGB)), np.uint8)


def grey(image: Image) -> Image:
    """The image without its colours, in as many channels."""
    if image.shape[2] == 1:
        return image
    return np.asarray(cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB), np.uint8)


def sharpness(image: Image, factor: float) -> Image:
    """The distance from the smoothed image times `factor`: 0 is smooth, 2 sharp; outermost pixels stay."""
    height, width = image.shape[:2]
    if min(height, width) <= 2:
        return image
    # Smooth is (the sum of nine + 4 x the middle) / 13.
    rest = 1 - factor
    nine = cv2.boxFilter(image, -1, (3, 3))
    result = cv2.addWeighted(image, factor + rest * 4 / 13, nine, rest * 9 / 13, 0).reshape(image.shape)
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        result[edge] = image[edge]
    return np.asarray(result, np.uint8)


def posterize(image: Image, bits: int) -> Image:
    """Only the highest `bits` bits of every level."""
    return image & np.uint8(256 - (1 << (8 - bits)))


def solarize(image: Image, threshold: float) -> Image:
    """Levels of at least `threshold` are inverted."""
    _, chosen = cv2.threshold(image, math.ceil(threshold) - 1, 255, cv2.THRESH_BINARY)
    return np.asarray(cv2.bitwise_xor(image, chosen.reshape(image.shape)), np.uint8).reshape(image.shape)


def invert(image: Image) -> Image:
    """White for black."""
    return np.asarray(cv2.bitwise_not(image), np.uint8).reshape(image.shape)


def autocontrast(image: Image) -> Image:
    """Every channel stretched so that its darkest level is 0 and its brightest 255."""
    darkest, brightest = (edge(edge(image, axis=0), axis=0).astype(np.float32) for edge in (np.min, np.max))
    flat = darkest == brightest
    span = np.where(flat, np.float32(1), (brightest - darkest) * np.float32(1 / 255))
    return _looked_up(image, (LEVELS - np.where(flat, np.float32(0), darkest)) / span)


def equalize(image: Image) -> Image:
    """Every channel with its levels spread so that each is as frequent as the others, as Pillow does it."""
    counts = [cv2.calcHist([image], [c], None, [256], [0, 256]) for c in range(image.shape[2])]
    return _looked_up(image, np.stack([_equal(np.asarray(one, np.int64).ravel()) for one in counts], axis=1))


def blurred(image: Image, sigma: float) -> Image:
    """Under a Gaussian of `sigma` pixels, cut off at three of them."""
    taps = 2 * round(3 * sigma) + 1
    return np.asarray(cv2.GaussianBlur(image, (taps, taps), sigma), np.uint8).reshape(image.shape)


def channel_means(image: Image) -> NDArray[np.float64]:
    """The mean level of each channel, [C]."""
    sums = np.array(cv2.sumElems(image)[: image.shape[2]], np.float64)
    means: NDArray[np.float64] = sums / (image.shape[0] * image.shape[1])
    return means


def _equal(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    step = int(counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
    if step == 0:
        return np.arange(256)
    return np.concatenate([[0], (np.cumsum(counts)[:-1] + step // 2) // step])


def _looked_up(image: Image, table: NDArray[np.floating] | NDArray[np.int64]) -> Image:
    """Every level replaced by its entry in `table`, [256, C], cut off to 0 ... 255."""
    levels = np.clip(table, 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(image, levels.reshape(1, 256, -1)), np.uint8).reshape(image.shape)
