"""What each transform of a recipe can be told: names, units, limits and defaults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from training.config.tree import Fraction, Rate, Section


def _within(least: float, most: float) -> AfterValidator:
    """Limits of a number, at least 0, or of the two ends of a range; the latter in order."""

    def check(value: float | Pair) -> float | Pair:
        low, high = value if isinstance(value, tuple) else (max(least, 0.0), value)
        if not least <= low <= high <= most:
            kind = f"two numbers, the least first, from {least:g}" if isinstance(value, tuple) else "from 0"
            raise ValueError(f"allowed are {kind} to {most:g}")
        return value

    return AfterValidator(check)


Pair = tuple[float, float]
Size = Annotated[int, Field(gt=0, le=16384)]
Level = Annotated[int, Field(ge=0, le=255)]
Padding = Annotated[int, Field(ge=0, le=4096)]
Shares = Annotated[Pair, _within(0, 1)]
Aspects = Annotated[Pair, _within(0.01, 100)]
Widths = Annotated[Pair, _within(0.01, 100)]
Scales = Annotated[Pair, _within(0.01, 100)]
Angles = Annotated[float | Pair, _within(-180, 180)]
Shears = Annotated[float | Pair, _within(-80, 80)]
Factors = Annotated[float | Pair, _within(0, 10)]
Hues = Annotated[float | Pair, _within(-0.5, 0.5)]


class Sized(Section):
    """A transform that makes one size."""

    size: Size
    """pixels"""


class ResizeTo(Section):
    """Scale, whatever the aspect."""

    height: Size
    """pixels"""
    width: Size
    """pixels"""


class ResizedCenterCrop(Sized):
    """Scale and cut the centre, in one step."""

    shorter: Size
    """pixels of the shorter side that the whole picture is scaled to; at least `size`"""

    @model_validator(mode="after")
    def _within(self) -> ResizedCenterCrop:
        if self.size > self.shorter:
            raise ValueError(f"size {self.size} is more than shorter {self.shorter}")
        return self


class RandomResizedCrop(Sized):
    """Cut a random rectangle and scale it."""

    scale: Shares = (0.08, 1.0)
    """least and greatest share of the area"""
    ratio: Aspects = (0.75, 4 / 3)
    """least and greatest width / height"""


class RandomShift(Section):
    """Move by whole pixels."""

    fraction: Fraction
    """of each side, at most"""


class Perhaps(Section):
    """A transform that is applied to half of the pictures."""

    probability: Fraction = 0.5
    """share of the pictures that it is applied to"""


class Always(Section):
    """A transform that is applied to every picture, unless told otherwise."""

    probability: Fraction = 1.0
    """share of the pictures that it is applied to"""


class Filling(Section):
    """A transform that may uncover what lies outside of a picture."""

    fill: Level = 0
    """grey level of what was outside of the image"""
    mask_fill: Level = 255
    """class number of what was outside of the mask; 255: ignored"""


class Pad(Filling):
    """Add a border."""

    padding: Padding
    """pixels on each side"""


class RandomCrop(Filling, Sized):
    """Cut a square anywhere."""

    padding: Padding = 0
    """pixels that are first added on each side"""


class QuarterTurn(Section):
    """Turn by a random multiple of 90 degrees."""


class Rotation(Filling, Always):
    """Turn about the centre."""

    degrees: Angles
    """greatest angle either way, or least and greatest, counter-clockwise"""


class Affine(Filling, Always):
    """Turn, move, scale and shear at once."""

    degrees: Angles = 0.0
    """greatest angle either way, or least and greatest, clockwise"""
    translate: tuple[Fraction, Fraction] = (0.0, 0.0)
    """greatest move, in shares of width and height"""
    scale: Scales = (1.0, 1.0)
    """least and greatest factor"""
    shear: Shears = 0.0
    """greatest angle along the x axis either way, or least and greatest, degrees"""


class Elastic(Filling, Always):
    """Displace every pixel by a smooth random field."""

    alpha: Rate = 50.0
    """strength, as torchvision measures it: 50 displaces by 0.8 pixels at a sigma of 5"""
    sigma: Annotated[float, Field(ge=0.1, le=1000)] = 5.0
    """standard deviation of the Gaussian that makes the field smooth, pixels"""


class ColorJitter(Always):
    """Change the colours, in random order."""

    brightness: Factors = 0.0
    """x: factor from 1 - x to 1 + x; or least and greatest factor"""
    contrast: Factors = 0.0
    """x: factor from 1 - x to 1 + x; or least and greatest factor"""
    saturation: Factors = 0.0
    """x: factor from 1 - x to 1 + x; or least and greatest factor"""
    hue: Hues = 0.0
    """x: from -x to x turns of the circle of hues; or least and greatest"""


class RandomGrayscale(Section):
    """Take the colours away."""

    probability: Fraction = 0.1
    """share of the pictures that it is applied to"""


class GaussianBlur(Always):
    """Blur."""

    sigma: Widths = (0.1, 2.0)
    """least and greatest standard deviation, pixels"""


class Sharpness(Perhaps):
    """Smooth or sharpen."""

    factor: Annotated[float, Field(ge=0, le=10)]
    """0: smooth, 1: as it is, 2: sharp"""


class Posterize(Perhaps):
    """Keep few levels."""

    bits: Annotated[int, Field(ge=1, le=8)]
    """of every level that stay"""


class Solarize(Perhaps):
    """Invert what is bright."""

    threshold: Annotated[float, Field(ge=0, le=255)]
    """grey level from which on is inverted"""


class RandAugment(Filling):
    """A few random operations of one strength."""

    operations: Annotated[int, Field(ge=0, le=14)] = 2
    """one after the other"""
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """strength of each, of 30"""


class RandomErasing(Perhaps):
    """Hide a random rectangle."""

    scale: Shares = (0.02, 0.33)
    """least and greatest share of the area"""
    ratio: Aspects = (0.3, 3.3)
    """least and greatest height / width"""
    fill: Literal["zero", "mean", "noise"] = "zero"
    """black, the image's mean colour, or random levels"""
