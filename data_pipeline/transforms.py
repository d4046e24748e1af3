"""The table of everything that may be done to pixels before a batch is made, by the names that recipes use.

H W pixels, C channels. A transform takes Pixels (a uint8 image [H, W, C], C = 3 or 1, and in segmentation its
mask [H, W]), a generator and its parameters, and gives Pixels; it never changes what it was given, but may
return a view of it. Geometric ones move image and mask alike, all others leave the mask alone. Every random
number comes from the sample's own generator; how many are drawn does not depend on what the picture shows.
Pure: the same pixels, generator and parameters give the same pixels in any thread or process.
"""

from __future__ import annotations

from collections.abc import Callable

from data_pipeline.batch import Pixels
from data_pipeline.colour import (
    autocontrast,
    color_jitter,
    equalize,
    gaussian_blur,
    invert,
    posterize,
    random_grayscale,
    sharpness,
    solarize,
)
from data_pipeline.erasing import random_erasing
from data_pipeline.frames import FRAMES as FRAMES
from data_pipeline.frames import Frame as Frame
from data_pipeline.frames import cut as cut
from data_pipeline.frames import cutting
from data_pipeline.moves import (
    center_crop,
    horizontal_flip,
    pad,
    quarter_turn,
    random_crop,
    random_shift,
    vertical_flip,
)
from data_pipeline.policies import rand_augment, trivial_augment
from data_pipeline.warps import affine, elastic, rotation

Transform = Callable[..., Pixels]  # (pixels, draws, **parameters)

TRANSFORMS: dict[str, Transform] = {
    **{name: cutting(frame_of) for name, frame_of in FRAMES.items()},
    "center_crop": center_crop,
    "random_crop": random_crop,
    "pad": pad,
    "random_shift": random_shift,
    "horizontal_flip": horizontal_flip,
    "vertical_flip": vertical_flip,
    "quarter_turn": quarter_turn,
    "rotation": rotation,
    "affine": affine,
    "elastic": elastic,
    "color_jitter": color_jitter,
    "random_grayscale": random_grayscale,
    "gaussian_blur": gaussian_blur,
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "invert": invert,
    "autocontrast": autocontrast,
    "equalize": equalize,
    "rand_augment": rand_augment,
    "trivial_augment": trivial_augment,
    "random_erasing": random_erasing,
}
