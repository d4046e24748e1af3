"""Makes one micro-batch: plan -> read -> decode -> augment -> collate, a webdataset pipeline over samples.

What comes out is a pure function of the recipe and the work: not of who does it, after what, or beside whom.
Shapes: B samples of the micro-batch, E samples read only as partners, H W pixels, C channels or labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import webdataset
from numpy.typing import NDArray

from data_pipeline.batch import BadSample, Image, Mask, Pixels, RawSample, Sample
from data_pipeline.decode import sample_fault
from data_pipeline.draws import Purpose, bit_stream
from data_pipeline.fault import UserError
from data_pipeline.framing import Opener
from data_pipeline.index import DatasetIndex
from data_pipeline.partners import mix_rows, partner_targets, wanted
from data_pipeline.plan import Work
from data_pipeline.read import ShardReader
from data_pipeline.slots import Buffer
from data_pipeline.store import Store
from data_pipeline.transforms import TRANSFORMS

READ_AHEAD = 32  # samples whose bytes are fetched together: neighbours in a tar cost one read
TRIES = 100  # neighbours of a broken sample that are tried in its place


@dataclass(frozen=True)
class Recipe:
    """Everything between a sample's number and its pixels: where it lies, what is done to it, the seed."""

    store: Store
    dataset: DatasetIndex
    split: str
    transforms: tuple[tuple[str, dict[str, Any]], ...]  # name and parameters, in order
    seed: int
    pinned: bool = False  # page-locked buffers, for a GPU
    mixup: float = 0.0  # alpha of the Beta distribution; 0: off
    cutmix: float = 0.0
    skip_bad: bool = True  # put a neighbour in the place of a broken sample, instead of raising
    sharers: int = 1  # processes of this machine whose shards go through the same cache


class Filled(NamedTuple):
    """A micro-batch as numpy arrays. `private` is None where the pixels lie in the buffer that was given."""

    work: Work
    keys: list[str]
    shape: tuple[int, ...]  # of an image: H, W, C
    masked: bool
    private: Buffer | None  # the images' bytes, then the masks'
    targets: NDArray[Any] | None  # int64 [B] or int8 [B, C]; None: the masks are the targets
    partner_targets: NDArray[Any] | None
    share: NDArray[np.float32] | None  # [B], of the sample itself where it was mixed with another
    bad: tuple[BadSample, ...]


class _Read(NamedTuple):
    """A sample on its way: the row that it gets, and the number and copy that the plan gave it."""

    work: Work
    row: int
    number: int
    copy: int
    raw: RawSample


class Producer:
    """Produces the micro-batches of one split. Not shared: each worker has its own, so nothing is locked."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._reader = ShardReader(recipe.store, recipe.dataset, recipe.split)
        self._samples = recipe.dataset.split(recipe.split).samples
        self._open = Opener(recipe.dataset, recipe.transforms[0] if recipe.transforms else None)
        self._rest = [(TRANSFORMS[name], parameters) for name, parameters in recipe.transforms[1:]]
        self._bad: list[BadSample] = []
        self._rows: Image | None = (
            None  # of the batch that is being made, once its first sample has shown its shape
        )

    def close(self) -> None:
        """Close the tars."""
        self._reader.close()

    def __call__(self, work: Work, buffer: Buffer | None = None) -> Filled:
        """The micro-batch that `work` describes, its pixels in `buffer` if they fit.

        DATA for a broken sample that may not be skipped, CONFIG where pictures come out in different sizes.
        """
        self._bad, self._rows = [], None
        filled: Filled
        (filled,) = webdataset.DataPipeline(
            partial(iter, [work]), self._read, self._decode, self._augment, partial(self._collate, buffer)
        )
        return filled

    def _read(self, works: Iterator[Work]) -> Iterator[_Read]:
        for work in works:
            numbers, copies = wanted(work)
            for first in range(0, len(numbers), READ_AHEAD):
                raws = self._reader.read_many(numbers[first : first + READ_AHEAD])
                for row, raw in enumerate(raws, first):
                    yield _Read(work, row, raw.number, int(copies[row]), raw)

    def _decode(self, items: Iterator[_Read]) -> Iterator[tuple[_Read, Sample | UserError]]:
        for item in items:
            try:
                sample: Sample | UserError = self._opened(item)
            except ValueError as error:
                sample = _sample_error(item.raw, error)
            yield item, sample

    def _opened(self, item: _Read) -> Sample:
        if item.raw.fault is not None:
            raise item.raw.fault
        # Keyed by the sample of the plan, not by who reads it or after what: the same pixels on any topology.
        at = (item.number, item.copy)
        bits = bit_stream(self._recipe.seed, Purpose.AUGMENTATION, item.work.epoch, at=at)
        draws = np.random.Generator(bits)
        is_own = item.row < len(item.work.numbers)
        row = self._rows[item.row] if self._rows is not None and is_own else None
        pixels = self._open(item.raw, draws, row)
        return Sample(item.work, item.number, item.raw.key, pixels, item.raw.label, draws)

    def _in_its_place(self, item: _Read, error: UserError) -> Sample:
        """The next sample of the split that is whole: the same one for whoever meets the broken one."""
        if not self._recipe.skip_bad:
            raise error
        raw = item.raw
        for distance in range(1, TRIES):
            other = item._replace(raw=self._reader.read((item.number + distance) % self._samples))
            try:
                sample = self._finished(self._opened(other))
            except ValueError as another:
                _sample_error(other.raw, another)
                continue
            # A partner from beyond is reported by the process whose own sample it is, a stand-in by nobody.
            if item.row < len(item.work.numbers) and item.work.valid:
                self._bad.append(BadSample(raw.shard, raw.key, raw.offset, error.what, sample.key))
            return sample
        raise error

    def _augment(self, opened: Iterator[tuple[_Read, Sample | UserError]]) -> Iterator[Sample]:
        for item, found in opened:
            try:
                if isinstance(found, UserError):
                    raise found
                sample = self._finished(found)
            except ValueError as error:
                sample = self._in_its_place(item, _sample_error(item.raw, error))
            yield sample

    def _finished(self, sample: Sample) -> Sample:
        pixels = sample.pixels
        for transform, parameters in self._rest:
            pixels = transform(pixels, sample.draws, **parameters)
        return sample._replace(pixels=pixels)

    def _collate(self, buffer: Buffer | None, samples: Iterator[Sample]) -> Iterator[Filled]:
        first = next(samples)
        work, shape, masked = first.work, first.pixels.image.shape, first.pixels.mask is not None
        count, private = len(work.numbers), None
        size = pixel_bytes(count, shape, masked=masked)
        if buffer is None or len(buffer) < size:
            buffer = private = np.empty(size, np.uint8)
        self._rows, masks = pixel_arrays(buffer, count, shape, masked=masked)
        images = self._rows
        keys: list[str] = []
        targets: list[Any] = []
        beyond: list[Pixels] = []
        for row, sample in enumerate(chain([first], samples)):
            _check_same_size(first, sample)
            targets.append(sample.target)
            if row >= count:
                beyond.append(sample.pixels)
                continue
            keys.append(sample.key)
            if not _is_same_array(sample.pixels.image, images[row]):  # or it was made in its place already
                images[row] = sample.pixels.image
            if masks is not None and sample.pixels.mask is not None:
                masks[row] = sample.pixels.mask
        self._rows = None
        together = None if masked else np.array(targets, np.int8 if np.ndim(targets[0]) else np.int64)
        share = others = None
        if work.partners is not None:
            recipe = self._recipe
            share = mix_rows(
                work, images, masks, beyond, seed=recipe.seed, mixup=recipe.mixup, cutmix=recipe.cutmix
            )
            others = None if together is None else partner_targets(work, together)
        own = None if together is None else together[:count]
        # A mask that was pasted together is a target like any other.
        share = None if masked else share
        yield Filled(work, keys, shape, masked, private, own, others, share, tuple(self._bad))


def pixel_bytes(count: int, shape: tuple[int, ...], *, masked: bool) -> int:
    """Bytes of `count` images of `shape` (H, W, C), with their masks where there are some."""
    height, width, channels = shape
    return count * height * width * (channels + masked)


def pixel_arrays(
    buffer: Buffer, count: int, shape: tuple[int, ...], *, masked: bool
) -> tuple[Image, Mask | None]:
    """Views of a buffer: images [B, H, W, C] and, behind them, masks [B, H, W]."""
    size = pixel_bytes(count, shape, masked=False)
    images = buffer[:size].reshape(count, *shape)
    if not masked:
        return images, None
    return images, buffer[size : size + count * shape[0] * shape[1]].reshape(count, *shape[:2])


def _is_same_array(one: Image, other: Image) -> bool:
    return (
        one.__array_interface__["data"] == other.__array_interface__["data"] and one.strides == other.strides
    )


def _sample_error(raw: RawSample, error: ValueError) -> UserError:
    """The fault of a sample with its place; what is no fault of the sample's is raised."""
    if isinstance(error, UserError) and error.code != "DATA":
        raise error
    return error if isinstance(error, UserError) and error.place else sample_fault(raw, error)


def _check_same_size(first: Sample, sample: Sample) -> None:
    here, there = first.pixels.image.shape, sample.pixels.image.shape
    if here != there:
        sizes = " x ".join(map(str, here)), " x ".join(map(str, there))
        raise UserError(
            f"pictures of different sizes in one batch: {first.key!r} {sizes[0]}, {sample.key!r} {sizes[1]} "
            "(height, width, channels)",
            mend="end the transforms with one that fixes the size: random_resized_crop, center_crop",
            code="CONFIG",
        )
