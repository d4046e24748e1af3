"""Lays a mask over its picture: translucent colours, one for each class, with an outline.

Shapes: H W pixels, C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from data_pipeline.index import DatasetIndex
from data_pipeline.masks import IGNORED

# Told apart on grey and on most tissue, and by most of the colour-blind (after Okabe and Ito, 2008).
COLOURS = (
    *((0, 158, 255), (255, 159, 0), (0, 200, 120), (240, 70, 60), (190, 100, 255)),
    *((245, 225, 50), (255, 120, 190), (0, 215, 215), (150, 105, 60), (120, 140, 30)),
)
IGNORED_COLOUR = (128, 128, 128)
SHARE = 0.4  # of the colour in what is seen inside an outline
CLEAR = ("background", "bg", "0", "none", "unlabeled", "unlabelled", "void")  # names of a first class


def class_colours(dataset: DatasetIndex) -> dict[int, tuple[int, int, int]]:
    """The colour of each class that gets one: all but a first class that is the background."""
    clear = dataset.classes[0].lower() in CLEAR
    numbers = range(int(clear), len(dataset.classes))
    return {number: COLOURS[place % len(COLOURS)] for place, number in enumerate(numbers)}


def laid_over(
    picture: PillowImage.Image, classes: NDArray[np.uint8], colours: dict[int, tuple[int, int, int]]
) -> PillowImage.Image:
    """The picture under the colours of its mask [H, W], which is brought to the picture's size."""
    size = PillowImage.fromarray(classes).resize(picture.size, PillowImage.Resampling.NEAREST)
    small = np.asarray(size)
    table = np.zeros((256, 3), np.float64)
    painted = np.zeros(256, np.bool_)
    for number, colour in (*colours.items(), (IGNORED, IGNORED_COLOUR)):
        table[number], painted[number] = colour, True
    share = np.where(painted[small], SHARE, 0.0)
    share[_outline(small) & painted[small]] = 1.0
    pixels = np.asarray(picture.convert("RGB"), np.float64)
    mixed = pixels + (table[small] - pixels) * share[:, :, None]
    return PillowImage.fromarray(mixed.round().astype(np.uint8))


def _outline(classes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The pixels of each class that touch another one above, below, left or right."""
    padded = np.pad(classes, 1, mode="edge")
    inner = padded[1:-1, 1:-1]
    touching: NDArray[np.bool_] = (inner != padded[:-2, 1:-1]) | (inner != padded[2:, 1:-1])
    touching |= (inner != padded[1:-1, :-2]) | (inner != padded[1:-1, 2:])
    return touching
