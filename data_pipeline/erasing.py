"""Erases a random rectangle of an image; the mask stays as it is: what is hidden is still there to be found.

Source: Zhong et al., Random Erasing Data Augmentation (AAAI 2020), as torchvision's RandomErasing draws it.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from data_pipeline.batch import Pixels
from data_pipeline.chance import below, between, happens, noise
from data_pipeline.tones import channel_means

Fill = Literal["zero", "mean", "noise"]


def random_erasing(
    pixels: Pixels,
    draws: np.random.Generator,
    *,
    probability: float = 0.5,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
    fill: Fill = "zero",
) -> Pixels:
    """Fill a rectangle of random area (a share of the image) and aspect (height / width).

    With black, the image's mean colour, or a random level for every pixel and channel. After ten rectangles
    that do not fit nothing is erased.
    """
    if not happens(draws, probability):
        return pixels
    height, width = pixels.image.shape[:2]
    for _ in range(10):
        area = height * width * between(draws, *scale)
        aspect = math.exp(between(draws, math.log(ratio[0]), math.log(ratio[1])))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows < height and columns < width:
            break
    else:
        return pixels
    top, left = below(draws, height - rows + 1), below(draws, width - columns + 1)
    image = pixels.image.copy()
    hole = image[top : top + rows, left : left + columns]
    if fill == "noise":
        hole[:] = noise(draws, hole.size).reshape(hole.shape)
    else:
        hole[:] = np.rint(channel_means(pixels.image)).astype(np.uint8) if fill == "mean" else 0
    return pixels._replace(image=image)
