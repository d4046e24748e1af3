"""What is done to pixels before a batch is made; every random number comes from the sample's own generator.

H W pixels, C channels. A transform takes a uint8 image [H, W, C], a generator and its parameters, and returns
one. Pure: the same image, generator and parameters give the same pixels in any thread or process.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np

from data_pipeline.batch import Image

cv2.setNumThreads(1)  # reader workers are the parallelism; cv2's own threads would only take their cores

Transform = Callable[..., Image]


def resize(image: Image, _draws: np.random.Generator, *, size: int) -> Image:
    """Scale so that the shorter side has `size` pixels, antialiased."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    return _scaled(image, max(size, round(height * scale)), max(size, round(width * scale)))


def center_crop(image: Image, _draws: np.random.Generator, *, size: int) -> Image:
    """Cut the central `size` x `size` pixels; smaller images are padded with zeros first."""
    image = _padded_to(image, size)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def random_shift(image: Image, draws: np.random.Generator, *, fraction: float) -> Image:
    """Move by up to `fraction` of each side, in whole pixels; what moves in repeats the border."""
    height, width = image.shape[:2]
    reach_y, reach_x = int(height * fraction), int(width * fraction)
    top, left = _below(draws, 2 * reach_y + 1), _below(draws, 2 * reach_x + 1)
    padded = np.pad(image, ((reach_y, reach_y), (reach_x, reach_x), (0, 0)), mode="edge")
    return padded[top : top + height, left : left + width]


def random_resized_crop(
    image: Image,
    draws: np.random.Generator,
    *,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image:
    """Cut a rectangle of random area and aspect, scaled to `size` x `size`, antialiased.

    Source: Szegedy et al., Going Deeper with Convolutions (2015), as torchvision's RandomResizedCrop draws
    it: ten tries, then the largest central rectangle of an allowed aspect.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * _between(draws, *scale)
        aspect = math.exp(_between(draws, math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = _below(draws, height - crop_height + 1), _below(draws, width - crop_width + 1)
            break
    else:
        crop_width = min(width, max(1, round(height * ratio[1])))
        crop_height = min(height, max(1, round(width / ratio[0])))
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return _scaled(image[top : top + crop_height, left : left + crop_width], size, size)


def horizontal_flip(image: Image, draws: np.random.Generator, *, probability: float = 0.5) -> Image:
    """Mirror left and right with the given probability."""
    return image[:, ::-1] if draws.random() < probability else image


TRANSFORMS: dict[str, Transform] = {
    "resize": resize,
    "center_crop": center_crop,
    "random_shift": random_shift,
    "random_resized_crop": random_resized_crop,
    "horizontal_flip": horizontal_flip,
}


def _scaled(image: Image, height: int, width: int) -> Image:
    """Area averaging to make smaller (antialiased; cv2's linear is not), linear to make larger."""
    if image.shape[:2] == (height, width):
        return image
    smaller = image.shape[0] > height or image.shape[1] > width
    contiguous = np.ascontiguousarray(image)
    method = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    scaled = cv2.resize(contiguous, (width, height), interpolation=method)
    return np.asarray(scaled, np.uint8).reshape(height, width, image.shape[2])


def _padded_to(image: Image, size: int) -> Image:
    missing_y, missing_x = max(0, size - image.shape[0]), max(0, size - image.shape[1])
    if not missing_y and not missing_x:
        return image
    before_y, before_x = missing_y // 2, missing_x // 2
    return np.pad(image, ((before_y, missing_y - before_y), (before_x, missing_x - before_x), (0, 0)))


# Both from `Generator.random`, which is a fixed function of the bit stream; `integers` may change with numpy.
def _below(draws: np.random.Generator, count: int) -> int:
    return int(draws.random() * count)


def _between(draws: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * draws.random()
