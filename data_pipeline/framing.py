"""Opens a sample, together with its first transform: a JPEG that will be cut small is not decoded large."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from data_pipeline.batch import Encoded, Image, Pixels, RawSample, Size
from data_pipeline.decode import decode_reduced
from data_pipeline.index import DatasetIndex
from data_pipeline.masks import class_table, mask_classes, read_mask
from data_pipeline.transforms import FRAMES, TRANSFORMS, Frame, cut

REDUCTIONS = (8, 4, 2)  # of a JPEG's inverse cosine transform


class Opened(NamedTuple):
    """The pixels of a sample, and the size that its picture has in its file."""

    pixels: Pixels
    size: Size


class Opener:
    """From a sample's bytes to its pixels, the first transform (name, parameters) applied."""

    def __init__(self, dataset: DatasetIndex, first: tuple[str, dict[str, Any]] | None) -> None:
        self._mode = dataset.image_mode
        self._classes, self._labels = class_table(dataset.mask_values), len(dataset.classes)
        self._name, self._parameters = first or ("", {})

    def __call__(self, raw: RawSample, draws: np.random.Generator, out: Image | None = None) -> Pixels:
        """The pixels of what `open` gives."""
        return self.open(raw, draws, out).pixels

    def open(self, raw: RawSample, draws: np.random.Generator, out: Image | None = None) -> Opened:
        """The sample, made in `out` if it fits a cut; ValueError where image, label or mask is wrong."""
        self._check_label(raw)
        if raw.mask is None and self._name in FRAMES:
            return self._decoded_cut(raw.image, draws, out)
        pixels = self._decoded_whole(raw)
        size = Size(*pixels.image.shape[:2])
        if self._name:
            pixels = TRANSFORMS[self._name](pixels, draws, **self._parameters)
        return Opened(pixels, size)

    def _check_label(self, raw: RawSample) -> None:
        """A label that is none would be an error in the middle of a step, and on a GPU one without words."""
        if isinstance(raw.label, int):
            fits, allowed = 0 <= raw.label < self._labels, f"0 to {self._labels - 1}"
        else:
            label = raw.label
            fits = label is None or (
                len(label) == self._labels and bool(((label >= -1) & (label <= 1)).all())
            )
            allowed = f"{self._labels} of 1, 0 and -1"
        if not fits:
            raise ValueError(f"the label {raw.label}, allowed are {allowed}")

    def _decoded_cut(self, data: Encoded, draws: np.random.Generator, out: Image | None) -> Opened:
        frames: list[Frame] = []  # drawn once, also where a second decoder has to try

        def reduction(height: int, width: int) -> int:
            if not frames:
                frames.append(FRAMES[self._name](height, width, draws, **self._parameters))
            frame = frames[0]
            spare = min(frame.height / frame.out_height, frame.width / frame.out_width)
            return next((by for by in REDUCTIONS if by <= spare), 1)

        decoded = decode_reduced(data, reduction, mode=self._mode)
        frame = _scaled(frames[0], decoded.image, decoded.height, decoded.width)
        shape = (frame.out_height, frame.out_width, decoded.image.shape[2])
        pixels = cut(Pixels(decoded.image), frame, out if out is not None and out.shape == shape else None)
        return Opened(pixels, Size(decoded.height, decoded.width))

    def _decoded_whole(self, raw: RawSample) -> Pixels:
        image = decode_reduced(raw.image, lambda _height, _width: 1, mode=self._mode).image
        if raw.mask is None:
            return Pixels(image)
        mask = mask_classes(read_mask(raw.mask), self._classes)
        if mask.shape != image.shape[:2]:
            sizes = " x ".join(map(str, image.shape[:2])), " x ".join(map(str, mask.shape))
            raise ValueError(f"the image has {sizes[0]} pixels, its mask {sizes[1]}")
        return Pixels(image, mask)


def _scaled(frame: Frame, image: Image, height: int, width: int) -> Frame:
    """The frame of a picture of `height` x `width`, in whole pixels of the image as it was decoded."""
    if image.shape[:2] == (height, width):
        return frame
    down, across = image.shape[0] / height, image.shape[1] / width
    top, left = round(frame.top * down), round(frame.left * across)
    bottom, right = round((frame.top + frame.height) * down), round((frame.left + frame.width) * across)
    return frame._replace(top=top, left=left, height=bottom - top, width=right - left)
