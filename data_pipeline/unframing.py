"""Finds the way back from the pixels that a network saw to those of the picture: for masks of its own size.

Only what keeps the whole picture has one: scaling, and borders around it. H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.batch import Size
from data_pipeline.fault import UserError
from data_pipeline.moves import Window, central_window
from data_pipeline.transforms import FRAMES

Transforms = Sequence[tuple[str, dict[str, Any]]]  # names and parameters, in order

# They change what pixels look like, not where they are.
STILL = {
    *("color_jitter", "random_grayscale", "gaussian_blur", "sharpness", "posterize", "solarize", "invert"),
    *("autocontrast", "equalize", "random_erasing"),
}
SCALING = ("resize", "resize_to", "resized_center_crop")
FIXING = ("resize_to", "resized_center_crop", "random_resized_crop", "center_crop", "random_crop")


class Back(NamedTuple):
    """One step of the way back: keep the rectangle of `kept` pixels at (top, left), scale it to `size`."""

    top: int
    left: int
    kept: Size
    size: Size


def fixes_size(transforms: Transforms) -> bool:
    """Whether all pictures come out in one size."""
    return any(name in FIXING for name, _ in transforms)


def check_undoable(transforms: Transforms) -> None:
    """CONFIG for a transform that no picture has a way back from."""
    known = {*STILL, *SCALING, "center_crop", "pad"}
    if strangers := [name for name, _ in transforms if name not in known]:
        raise _no_way_back(strangers[0], "moves pixels about at random")


def way_back(transforms: Transforms, size: Size) -> list[Back]:
    """The steps from what the transforms make of a picture of `size` to that size, the first one first.

    CONFIG for a transform that cuts pixels of it off. Where nothing is scaled or added there are none.
    """
    check_undoable(transforms)
    steps: list[Back] = []
    for name, parameters in transforms:
        if name in SCALING:
            frame = FRAMES[name](*size, np.random.default_rng(0), **parameters)  # these draw nothing
            after, window = Size(frame.out_height, frame.out_width), (0, 0, *size)
            if (frame.top, frame.left, frame.height, frame.width) != window:
                raise _no_way_back(name, f"cuts off pixels of a picture of {size.height} x {size.width}")
            step = Back(0, 0, after, size)
        elif name in ("center_crop", "pad"):
            after, step = _bordered(name, parameters, size)
        else:
            continue
        if after != size:
            steps.append(step)
        size = after
    return steps[::-1]


def _bordered(name: str, parameters: dict[str, Any], size: Size) -> tuple[Size, Back]:
    if name == "pad":
        border = parameters["padding"]
        window = Window(-border, -border, size.height + 2 * border, size.width + 2 * border)
    else:
        window = central_window(*size, size=parameters["size"])
    if min(window.height - size.height, window.width - size.width) < 0:
        raise _no_way_back(name, f"cuts off pixels of a picture of {size.height} x {size.width}")
    return Size(window.height, window.width), Back(-window.top, -window.left, size, size)


def _no_way_back(name: str, why: str) -> UserError:
    return UserError(
        f"data.eval_transforms: {name} {why}, so no mask of the picture's own size can be made",
        mend="train with transforms that keep the whole picture, such as --data.eval-transforms "
        "'[{resize_to: {height: 512, width: 512}}]'",
        code="CONFIG",
    )
