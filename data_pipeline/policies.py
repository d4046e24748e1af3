"""Draws a few of fourteen known changes for each picture: RandAugment and TrivialAugment.

Their tables are torchvision's, with two differences: what is turned or sheared is interpolated linearly, and
a mask moves along with its image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data_pipeline import tones
from data_pipeline.batch import Image, Pixels
from data_pipeline.chance import below, happens
from data_pipeline.masks import IGNORED
from data_pipeline.moves import Window, seen
from data_pipeline.warps import Linear, turn, warped

STRENGTHS = 31  # from 0, no change, to 30
MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
ENHANCEMENTS: dict[str, Callable[[Image, float], Image]] = {
    "brightness": tones.brightness,
    "color": tones.saturation,
    "contrast": tones.contrast,
    "sharpness": tones.sharpness,
}
WITHOUT_STRENGTH: dict[str, Callable[[Image], Image]] = {
    "identity": lambda image: image,
    "auto_contrast": tones.autocontrast,
    "equalize": tones.equalize,
}
OPERATIONS = (*WITHOUT_STRENGTH, *MOVES, *ENHANCEMENTS, "posterize", "solarize")


class Reach(NamedTuple):
    """How far the operations go at full strength."""

    shear: float  # tangent of the angle
    translate: float  # pixels, or with `relative` a share of the picture's side
    relative: bool
    rotate: float  # degrees
    enhance: float  # of brightness, colour, contrast and sharpness, away from 1
    bits: int  # lost to posterize


class Choice(NamedTuple):
    """One operation as it was drawn."""

    name: str
    strength: float  # share of its reach, from -1 to 1


RAND_AUGMENT = Reach(shear=0.3, translate=150 / 331, relative=True, rotate=30, enhance=0.9, bits=4)
TRIVIAL_AUGMENT = Reach(shear=0.99, translate=32, relative=False, rotate=135, enhance=0.99, bits=6)


def rand_augment(
    pixels: Pixels,
    draws: np.random.Generator,
    *,
    operations: int = 2,
    magnitude: int = 9,
    fill: int = 0,
    mask_fill: int = IGNORED,
) -> Pixels:
    """Apply so many random operations, one after the other, each with strength `magnitude` of 30.

    Source: Cubuk et al., RandAugment (NeurIPS 2020).
    """
    for _ in range(operations):
        choice = _drawn(draws, magnitude)
        pixels = operate(pixels, choice, RAND_AUGMENT, fill=fill, mask_fill=mask_fill)
    return pixels


def trivial_augment(
    pixels: Pixels, draws: np.random.Generator, *, fill: int = 0, mask_fill: int = IGNORED
) -> Pixels:
    """Apply one random operation with a random strength, from the wide range.

    Source: Müller and Hutter, TrivialAugment (ICCV 2021).
    """
    choice = _drawn(draws, below(draws, STRENGTHS))
    return operate(pixels, choice, TRIVIAL_AUGMENT, fill=fill, mask_fill=mask_fill)


def operate(
    pixels: Pixels, choice: Choice, reach: Reach, *, fill: int = 0, mask_fill: int = IGNORED
) -> Pixels:
    """The picture after one operation; those that have no direction take the strength without its sign."""
    name, strength = choice
    height, width = pixels.image.shape[:2]
    if name in ("translate_x", "translate_y"):
        sides = (width, 0) if name == "translate_x" else (0, height)
        right, down = (
            int(strength * reach.translate * (side if reach.relative else side > 0)) for side in sides
        )
        return seen(pixels, Window(-down, -right, height, width), fill, mask_fill)
    if name == "rotate":
        return warped(pixels, turn(-strength * reach.rotate), fill=fill, mask_fill=mask_fill)
    if name in ("shear_x", "shear_y"):
        # About the upper left corner, not the centre: a shear, and the move that brings the corner back.
        slant = strength * reach.shear
        along_x = name == "shear_x"
        inverse = Linear(1, slant, 0, 1) if along_x else Linear(1, 0, slant, 1)
        moved = (-slant * height / 2, 0.0) if along_x else (0.0, -slant * width / 2)
        return warped(pixels, inverse, moved=moved, fill=fill, mask_fill=mask_fill)
    return pixels._replace(image=_recoloured(pixels.image, name, strength, reach))


def _recoloured(image: Image, name: str, strength: float, reach: Reach) -> Image:
    if name in ENHANCEMENTS:
        return ENHANCEMENTS[name](image, 1 + strength * reach.enhance)
    if name == "posterize":
        return tones.posterize(image, round(8 - reach.bits * abs(strength)))
    if name == "solarize":
        return tones.solarize(image, round(255 * (1 - abs(strength)), 3))  # 119, not 119.00000000000001
    return WITHOUT_STRENGTH[name](image)


def _drawn(draws: np.random.Generator, magnitude: int) -> Choice:
    """Always two draws, whether or not the operation has a direction."""
    name = OPERATIONS[below(draws, len(OPERATIONS))]
    sign = -1 if happens(draws, 0.5) else 1
    return Choice(name, sign * magnitude / (STRENGTHS - 1))
