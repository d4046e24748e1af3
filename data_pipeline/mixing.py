"""MixUp and CutMix: how a pair of samples of the global batch is mixed, the same for whoever reads either.

Positions 2k and 2k + 1 of the global batch are partners; each is mixed with the other by the same `Mix`.
H W pixels, C channels.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import cv2
import numpy as np

from data_pipeline.batch import Pixels
from data_pipeline.chance import happens
from data_pipeline.draws import Purpose, bit_stream
from data_pipeline.fault import UserError

SHARES = 256  # a share is a whole number of these parts, so that a mixed level is computed without rounding
SMALLEST_ALPHA = 1e-6  # every share is 0 or 1 long before logarithms overflow
LARGEST_ALPHA = 4.0  # for 4 one try in 70 is taken, for 10 one in 185,000


class Box(NamedTuple):
    """A rectangle, in shares of the picture's height and width."""

    top: float
    left: float
    height: float
    width: float


class Mix(NamedTuple):
    """What is done to both samples of a pair."""

    kind: Literal["none", "mixup", "cutmix"]
    share: float  # of the sample itself; of CutMix as drawn, before its box is cut off at the picture's edge
    box: Box  # where CutMix shows the partner


class MixedPixels(NamedTuple):
    """A mixed sample, and how much of it is the sample itself."""

    pixels: Pixels
    share: float  # a multiple of 1 / 256 for MixUp, of 1 / (H * W) for CutMix


NOT_MIXED = Mix("none", 1.0, Box(0.0, 0.0, 0.0, 0.0))


def draw_mix(seed: int, epoch: int, step: int, pair: int, *, mixup: float, cutmix: float) -> Mix:
    """How pair `pair` (positions 2 * pair and 2 * pair + 1) of a global batch is mixed.

    `mixup`, `cutmix`: alpha of the Beta(alpha, alpha) that the share is drawn from, at most 4, 0 for never;
    with both, each is as likely. A small alpha gives shares near 0 and 1, a large one shares near 1/2.
    Sources: Zhang et al., mixup (ICLR 2018); Yun et al., CutMix (ICCV 2019).
    """
    if not mixup and not cutmix:
        return NOT_MIXED
    draws = np.random.Generator(bit_stream(seed, Purpose.MIXING, epoch, at=(step, pair)))
    first = happens(draws, 0.5)
    if not cutmix or (mixup and first):
        return Mix("mixup", _share(draws, mixup), NOT_MIXED.box)
    share = _share(draws, cutmix)
    side, middle_y, middle_x = math.sqrt(1 - share), draws.random(), draws.random()
    top, left = max(0.0, middle_y - side / 2), max(0.0, middle_x - side / 2)
    bottom, right = min(1.0, middle_y + side / 2), min(1.0, middle_x + side / 2)
    return Mix("cutmix", share, Box(top, left, bottom - top, right - left))


def mixed_image(own: Pixels, partner: Pixels, mix: Mix) -> MixedPixels:
    """A sample mixed with its partner; neither is changed. CONFIG where their sizes differ.

    CutMix pastes the partner's mask along with its image; MixUp has no meaning for masks.
    """
    if mix.kind == "none":
        return MixedPixels(own, 1.0)
    if own.image.shape != partner.image.shape:
        sizes = (" x ".join(map(str, one.image.shape)) for one in (own, partner))
        raise UserError(
            f"partners of different sizes cannot be mixed: {' and '.join(sizes)} (height, width, channels)",
            mend="end the transforms with one that fixes the size: random_resized_crop, center_crop",
            code="CONFIG",
        )
    if mix.kind == "mixup":
        assert own.mask is None, "MixUp of masks"
        # Levels of 8 bits times shares of 9: float32 holds every sum exactly, so only the end is rounded.
        image = cv2.addWeighted(own.image, mix.share, partner.image, 1 - mix.share, 0)
        return MixedPixels(Pixels(np.asarray(image, np.uint8).reshape(own.image.shape)), mix.share)
    return _pasted(own, partner, mix.box)


def _pasted(own: Pixels, partner: Pixels, box: Box) -> MixedPixels:
    height, width = own.image.shape[:2]
    top, bottom = round(box.top * height), round((box.top + box.height) * height)
    left, right = round(box.left * width), round((box.left + box.width) * width)
    inside = np.s_[top:bottom, left:right]
    image, mask = own.image.copy(), None
    image[inside] = partner.image[inside]
    if own.mask is not None and partner.mask is not None:
        mask = own.mask.copy()
        mask[inside] = partner.mask[inside]
    return MixedPixels(Pixels(image, mask), 1 - (bottom - top) * (right - left) / (height * width))


def _share(draws: np.random.Generator, alpha: float) -> float:
    """From Beta(alpha, alpha), to the nearest multiple of 1 / 256.

    In logarithms, since u ** (1 / alpha) is zero for most u where alpha is small.
    Source: Jöhnk, Erzeugung von betaverteilten und gammaverteilten Zufallszahlen (Metrika, 1964).
    """
    assert 0 < alpha <= LARGEST_ALPHA, alpha
    alpha = max(alpha, SMALLEST_ALPHA)
    while True:
        x, y = (math.log(1 - draws.random()) / alpha for _ in range(2))
        largest = max(x, y)
        total = math.exp(x - largest) + math.exp(y - largest)
        if largest + math.log(total) <= 0:
            return round(SHARES * math.exp(x - largest) / total) / SHARES
