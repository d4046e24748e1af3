"""Random changes of an image's colours and sharpness; they leave the mask alone.

H W pixels, C channels. The same draws are made for grey images, for which what is about colours does nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data_pipeline import tones
from data_pipeline.batch import Image, Pixels
from data_pipeline.chance import between, happens, order

Range = tuple[float, float]


def color_jitter(
    pixels: Pixels,
    draws: np.random.Generator,
    *,
    brightness: float | Range = 0.0,
    contrast: float | Range = 0.0,
    saturation: float | Range = 0.0,
    hue: float | Range = 0.0,
    probability: float = 1.0,
) -> Pixels:
    """Change brightness, contrast, saturation and hue, in random order, as torchvision's ColorJitter.

    A number x stands for factors from 1 - x (at least 0) to 1 + x; for hue, for -x to x turns of the circle.
    """
    if not happens(draws, probability):
        return pixels
    changes: list[tuple[Callable[[Image, float], Image], float, float]] = [
        (tones.brightness, between(draws, *_factors(brightness)), 1.0),
        (tones.contrast, between(draws, *_factors(contrast)), 1.0),
        (tones.saturation, between(draws, *_factors(saturation)), 1.0),
        (tones.hue, between(draws, *((-hue, hue) if isinstance(hue, int | float) else hue)), 0.0),
    ]
    image = pixels.image
    for number in order(draws, len(changes)):
        change, amount, nothing = changes[number]
        if amount != nothing:
            image = change(image, amount)
    return pixels._replace(image=image)


def random_grayscale(pixels: Pixels, draws: np.random.Generator, *, probability: float = 0.1) -> Pixels:
    """Take the colours away."""
    return _perhaps(pixels, draws, probability, tones.grey)


def gaussian_blur(
    pixels: Pixels, draws: np.random.Generator, *, sigma: Range = (0.1, 2.0), probability: float = 1.0
) -> Pixels:
    """Blur by a Gaussian of a random width, `sigma` pixels."""
    return _perhaps(pixels, draws, probability, tones.blurred, between(draws, *sigma))


def sharpness(
    pixels: Pixels, draws: np.random.Generator, *, factor: float, probability: float = 0.5
) -> Pixels:
    """Smooth (a factor below 1) or sharpen (above 1)."""
    return _perhaps(pixels, draws, probability, tones.sharpness, factor)


def posterize(pixels: Pixels, draws: np.random.Generator, *, bits: int, probability: float = 0.5) -> Pixels:
    """Keep only the highest bits of every level."""
    return _perhaps(pixels, draws, probability, tones.posterize, bits)


def solarize(
    pixels: Pixels, draws: np.random.Generator, *, threshold: float, probability: float = 0.5
) -> Pixels:
    """Invert all levels from `threshold` on."""
    return _perhaps(pixels, draws, probability, tones.solarize, threshold)


def invert(pixels: Pixels, draws: np.random.Generator, *, probability: float = 0.5) -> Pixels:
    """White for black."""
    return _perhaps(pixels, draws, probability, tones.invert)


def autocontrast(pixels: Pixels, draws: np.random.Generator, *, probability: float = 0.5) -> Pixels:
    """Stretch every channel to all levels."""
    return _perhaps(pixels, draws, probability, tones.autocontrast)


def equalize(pixels: Pixels, draws: np.random.Generator, *, probability: float = 0.5) -> Pixels:
    """Make all levels as frequent, channel by channel."""
    return _perhaps(pixels, draws, probability, tones.equalize)


def _perhaps(
    pixels: Pixels,
    draws: np.random.Generator,
    probability: float,
    change: Callable[..., Image],
    *amounts: float,
) -> Pixels:
    if not happens(draws, probability):
        return pixels
    return pixels._replace(image=change(pixels.image, *amounts))


def _factors(spread: float | Range) -> Range:
    return (max(0.0, 1 - spread), 1 + spread) if isinstance(spread, int | float) else spread
