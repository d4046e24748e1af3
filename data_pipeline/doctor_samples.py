"""Reads and decodes samples as training would, and says which of them it would have to skip.

Shapes: H W pixels, K channels, C classes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from data_pipeline.batch import Image, RawSample
from data_pipeline.decode import FORMATS, decode, has_grey_palette
from data_pipeline.draws import IntArray
from data_pipeline.fault import first_line
from data_pipeline.findings import Finding, Findings
from data_pipeline.index import DatasetIndex
from data_pipeline.masks import class_table, mask_classes, read_mask
from data_pipeline.orientation import EXIF_ORIENTATION, UPRIGHT
from data_pipeline.read import ShardReader

AT_ONCE = 32  # samples read together; their bytes are all that is in memory
TINY, THIN, LARGE = 8, 20, 1024  # shorter side in pixels, longer by shorter side, shorter side in pixels
ENOUGH = 128  # rows and columns of a picture that mean and deviation are taken of
COLOURLESS = ("1", "L", "LA", "I", "F")


@dataclass(frozen=True)
class Trait:
    """How many samples have something in common that is worth a note, and the first of them."""

    count: int
    shard: str
    key: str
    offset: int


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over pixels scaled to 0..1: how many there are, their sums and the sums of their squares, [K]."""

    pixels: int
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.pixels + other.pixels, self.sums + other.sums, self.squares + other.squares)


@dataclass(frozen=True, eq=False)
class Seen:
    """What decoding told of some samples. `masked` [C] counts the pixels of each class in the masks."""

    samples: int = 0
    moments: Moments = field(default_factory=lambda: Moments(0, np.zeros(3), np.zeros(3)))
    masked: IntArray = field(default_factory=lambda: np.zeros(256, np.int64))
    traits: dict[str, Trait] = field(default_factory=dict)

    def __add__(self, other: Seen) -> Seen:
        traits = dict(self.traits)
        for name, trait in other.traits.items():
            first = traits.get(name, Trait(0, trait.shard, trait.key, trait.offset))
            traits[name] = Trait(first.count + trait.count, first.shard, first.key, first.offset)
        return Seen(
            self.samples + other.samples,
            self.moments + other.moments,
            self.masked + other.masked,
            traits,
        )


def examine_samples(
    reader: ShardReader, dataset: DatasetIndex, numbers: IntArray, found: Findings
) -> Iterator[Seen | None]:
    """Read and decode the samples with these numbers; None where training would skip one, why to `found`."""
    for start in range(0, len(numbers), AT_ONCE):
        for raw in reader.read_many(numbers[start : start + AT_ONCE]):
            seen = _examine(raw, dataset)
            if isinstance(seen, Finding):
                found.add(seen)
            yield None if isinstance(seen, Finding) else seen


def _examine(raw: RawSample, dataset: DatasetIndex) -> Seen | Finding:
    def fault(code: str, what: str) -> Finding:
        return Finding(code, what, raw.shard, raw.key, raw.offset)

    if raw.fault is not None:
        return fault("unreadable", raw.fault.what.removeprefix(f"'{raw.shard}': sample {raw.key!r} "))
    # Whatever a decoder raises, it is this sample that training would stumble over.
    try:
        image = decode(raw.image, mode=dataset.image_mode)
    except Exception as error:
        return fault("undecodable", _words(error))
    traits = list(picture_traits(bytes(raw.image), dataset.image_mode))
    masked = np.zeros(256, np.int64)
    if raw.mask is not None:
        try:
            values = read_mask(raw.mask)
        except Exception as error:
            return fault("mask-unreadable", f"its mask: {_words(error)}")
        if values.shape != image.shape[:2]:
            return fault("mask-size", f"a mask of {_size(values)} pixels for an image of {_size(image)}")
        try:
            classes = mask_classes(values, class_table(dataset.mask_values))
        except ValueError as error:
            return fault("mask-value", first_line(error))
        masked = np.bincount(classes.ravel(), minlength=256)
        if np.count_nonzero(masked[: len(dataset.classes)]) < 2:
            traits.append("one-class-masks")
    place = {name: Trait(1, raw.shard, raw.key, raw.offset) for name in traits}
    return Seen(1, _moments(image), masked, place)


def _words(error: Exception) -> str:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return kind + first_line(error)


def _size(array: Image) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"


def _moments(image: Image) -> Moments:
    """Of all pixels of a small picture, of every so many of a large one: enough to see a mean that is off."""
    step = max(1, min(image.shape[:2]) // ENOUGH)
    image = np.ascontiguousarray(image[::step, ::step])
    means, deviations = cv2.meanStdDev(image)
    mean = np.resize(means / 255, 3)  # a grey picture counts alike in all channels
    variance = np.resize((deviations / 255) ** 2, 3)
    pixels = image.shape[0] * image.shape[1]
    return Moments(pixels, pixels * mean, pixels * (variance + mean**2))


def picture_traits(data: bytes, image_mode: str) -> Iterator[str]:
    """What a note may be made of, by the header of a picture that decodes: kinds of findings.KINDS."""
    try:
        picture = PillowImage.open(io.BytesIO(data), formats=FORMATS)
    except Exception:
        return  # one that only the other decoder knows; it has none of the traits that slow that one
    shorter, longer = sorted(picture.size)
    if shorter < TINY:
        yield "tiny-pictures"
    if longer > THIN * shorter:
        yield "thin-pictures"
    if shorter > LARGE:
        yield "large-pictures"
    if picture.info.get("progressive") or picture.info.get("progression"):
        yield "progressive"
    colourless = picture.mode in COLOURLESS or picture.mode.startswith("I;")
    if image_mode == "L" and not colourless and not has_grey_palette(picture):
        yield "coloured"
    if image_mode == "RGB" and colourless:
        yield "all-grey"
    if picture.mode.startswith("I") or (picture.format == "PNG" and data[24] == 16):
        yield "sixteen-bit"
    if _turned(picture):
        yield "turned"
    if getattr(picture, "is_animated", False):
        yield "animated"


def _turned(picture: PillowImage.Image) -> bool:
    """Whether EXIF says that it lies on its side; tags too odd to be read say nothing to any reader."""
    if not picture.info.get("exif"):
        return False
    try:
        return picture.getexif().get(EXIF_ORIENTATION) in UPRIGHT
    except Exception:
        return False
