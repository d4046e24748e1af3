"""Makes one micro-batch: plan -> read -> decode -> augment -> collate, a webdataset pipeline over samples.

What comes out is a pure function of the recipe and the work: not of who does it, after what, or beside whom.
Shapes: B samples of the micro-batch, E samples read only as partners, H W pixels, C channels or labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import webdataset
from numpy.typing import NDArray

from data_pipeline.batch import BadSample, Image, Pixels, RawSample, Sample
from data_pipeline.decode import sample_fault
from data_pipeline.draws import Purpose, bit_stream
from data_pipeline.fault import UserError
from data_pipeline.framing import Opener
from data_pipeline.partners import mix_rows, partner_targets, wanted
from data_pipeline.pixel_rows import is_same_array, pixel_arrays, pixel_bytes
from data_pipeline.plan import Work
from data_pipeline.recipe import Recipe as Recipe
from data_pipeline.recipe import reader_of
from data_pipeline.slots import Buffer
from data_pipeline.transforms import TRANSFORMS

READ_AHEAD = 32  # samples whose bytes are fetched together: neighbours in a tar cost one read
TRIES = 100  # neighbours of a broken sample that are tried in its place


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
    sizes: NDArray[np.int64]  # [B, 2], height and width of each picture before any transform
    blank: tuple[int, ...]  # rows of zeros: their samples are those in `bad`


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
        self._reader = reader_of(recipe)
        self._open = Opener(recipe.dataset, recipe.transforms[0] if recipe.transforms else None)
        self._rest = [(TRANSFORMS[name], parameters) for name, parameters in recipe.transforms[1:]]
        self._channels = recipe.dataset.channels
        self._bad: list[BadSample] = []
        self._blank: list[int] = []
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
        self._bad, self._blank, self._rows = [], [], None
        filled: Filled
        collate = partial(self._collate, work, buffer)
        (filled,) = webdataset.DataPipeline(
            partial(iter, [work]), self._read, self._decode, self._augment, collate
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
        pixels, size = self._open.open(item.raw, draws, row)
        return Sample(item.work, item.number, item.raw.key, pixels, item.raw.label, draws, size)

    def _in_its_place(self, item: _Read, error: UserError) -> Sample:
        """The next sample of the split that is whole: the same one for whoever meets the broken one."""
        if not self._recipe.skip_bad:
            raise error
        raw = item.raw
        for distance in range(1, TRIES):
            other = item._replace(raw=self._reader.read((item.number + distance) % self._reader.samples))
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

    def _augment(self, opened: Iterator[tuple[_Read, Sample | UserError]]) -> Iterator[tuple[int, Sample]]:
        """Each sample with its row; rows of broken ones may be left out."""
        for item, found in opened:
            try:
                if isinstance(found, UserError):
                    raise found
                sample = self._finished(found)
            except ValueError as error:
                fault, raw = _sample_error(item.raw, error), item.raw
                if self._recipe.unlabelled:
                    self._blank.append(item.row)
                    self._bad.append(BadSample(raw.shard, raw.key, raw.offset, fault.what, ""))
                    continue
                sample = self._in_its_place(item, fault)
            yield item.row, sample

    def _finished(self, sample: Sample) -> Sample:
        pixels = sample.pixels
        for transform, parameters in self._rest:
            pixels = transform(pixels, sample.draws, **parameters)
        return sample._replace(pixels=pixels)

    def _collate(
        self, work: Work, buffer: Buffer | None, samples: Iterator[tuple[int, Sample]]
    ) -> Iterator[Filled]:
        first = next(samples, None)  # none where every sample is broken and may be
        shown = Pixels(np.empty((0, 0, self._channels), np.uint8)) if first is None else first[1].pixels
        first_key = "" if first is None else first[1].key
        shape, masked = shown.image.shape, shown.mask is not None
        count, private = len(work.numbers), None
        size = pixel_bytes(count, shape, masked=masked)
        if buffer is None or len(buffer) < size:
            buffer = private = np.empty(size, np.uint8)
        self._rows, masks = pixel_arrays(buffer, count, shape, masked=masked)
        images = self._rows
        keys, sizes = [""] * count, np.zeros((count, 2), np.int64)
        targets: list[Any] = []
        beyond: list[Pixels] = []
        for row, sample in chain([first] if first else [], samples):
            _check_same_size(first_key, shape, sample)
            targets.append(sample.target)
            if row >= count:
                beyond.append(sample.pixels)
                continue
            keys[row], sizes[row] = sample.key, sample.size
            if not is_same_array(sample.pixels.image, images[row]):  # or it was made in its place already
                images[row] = sample.pixels.image
            if masks is not None and sample.pixels.mask is not None:
                masks[row] = sample.pixels.mask
        self._rows = None
        for row, one in zip(self._blank, self._bad, strict=False):
            keys[row], images[row] = one.key, 0
        together = None if masked else self._together(targets, count)
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
        bad, blank = tuple(self._bad), tuple(self._blank)
        yield Filled(work, keys, shape, masked, private, own, others, share, bad, sizes, blank)

    def _together(self, targets: list[Any], count: int) -> NDArray[Any]:
        """The labels of a micro-batch; zeros, which nobody reads, where there are none."""
        if self._recipe.unlabelled:
            return np.zeros(count, np.int64)
        return np.array(targets, np.int8 if np.ndim(targets[0]) else np.int64)


def _sample_error(raw: RawSample, error: ValueError) -> UserError:
    """The fault of a sample with its place; what is no fault of the sample's is raised."""
    if isinstance(error, UserError) and error.code != "DATA":
        raise error
    return error if isinstance(error, UserError) and error.place else sample_fault(raw, error)


def _check_same_size(first: str, shape: tuple[int, ...], sample: Sample) -> None:
    there = sample.pixels.image.shape
    if shape != there:
        sizes = " x ".join(map(str, shape)), " x ".join(map(str, there))
        raise UserError(
            f"pictures of different sizes in one batch: {first!r} {sizes[0]}, {sample.key!r} {sizes[1]} "
            "(height, width, channels)",
            mend="end the transforms with one that fixes the size: random_resized_crop, center_crop",
            code="CONFIG",
        )
