"""The reading pipeline: plan -> read -> decode -> augment -> collate, in threads, in plan order.

Each worker runs the whole pipeline (a webdataset DataPipeline) on every k-th micro-batch and the main thread
takes from the workers in turn, so the order of batches depends on neither their number nor their speed. The
decoders are C code that releases the interpreter, which is why threads are enough.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset

from data_pipeline.batch import Batch, RawSample, Sample
from data_pipeline.decode import decode_sample
from data_pipeline.draws import Purpose, bit_stream
from data_pipeline.fault import UserError
from data_pipeline.index import DatasetIndex
from data_pipeline.plan import Work
from data_pipeline.read import ShardReader
from data_pipeline.targets import target_reader
from data_pipeline.transforms import TRANSFORMS


@dataclass(frozen=True)
class Recipe:
    """Everything between a sample's number and its pixels: where it lies, what is done to it, the seed."""

    root: Path
    dataset: DatasetIndex
    split: str
    transforms: tuple[tuple[str, dict[str, object]], ...]  # name and parameters, in order
    seed: int
    pinned: bool  # page-locked buffers, which torch's allocator reuses once a copy to the GPU is done


def stream(
    recipe: Recipe, work: Callable[[], Iterator[Work]], *, workers: int, prefetch: int
) -> Generator[Batch, None, None]:
    """Yield the batches that `work()` asks for, in its order.

    `workers` threads of this process read ahead, `prefetch` batches each; 0 reads in the calling thread.
    Close the iterator (or exhaust it) to end the threads. An exception in a worker is raised here, at its
    batch.
    """
    if workers == 0:
        alone: Generator[Batch, None, None] = iter(_pipeline(recipe, work))
        return alone
    shares = [_pipeline(recipe, partial(_every, work, worker, workers)) for worker in range(workers)]
    return _in_turn(shares, prefetch)


def _every(work: Callable[[], Iterator[Work]], worker: int, workers: int) -> Iterator[Work]:
    return islice(work(), worker, None, workers)


def _pipeline(recipe: Recipe, source: Callable[[], Iterator[Work]]) -> webdataset.DataPipeline:
    return webdataset.DataPipeline(
        source,
        partial(_read, recipe),
        partial(_decode, recipe),
        partial(_augment, recipe),
        partial(_collate, recipe),
    )


def _read(recipe: Recipe, works: Iterator[Work]) -> Iterator[RawSample]:
    reader = ShardReader(recipe.root, recipe.dataset.split(recipe.split))
    try:
        for work in works:
            for number in work.numbers:
                yield reader.read(int(number), work)
    finally:
        reader.close()


def _decode(recipe: Recipe, raws: Iterator[RawSample]) -> Iterator[Sample]:
    target_of = target_reader(recipe.dataset.task)
    for raw in raws:
        image = decode_sample(raw, mode=recipe.dataset.image_mode)
        yield Sample(raw.work, raw.number, raw.key, image, target_of(raw, len(recipe.dataset.classes)))


def _augment(recipe: Recipe, samples: Iterator[Sample]) -> Iterator[Sample]:
    steps = [(TRANSFORMS[name], parameters) for name, parameters in recipe.transforms]
    for sample in samples:
        # Keyed by the sample, not by who reads it or after what: the same pixels on any topology.
        bits = bit_stream(recipe.seed, Purpose.AUGMENTATION, sample.work.epoch, at=(sample.number, 0))
        draws = np.random.Generator(bits)
        image = sample.image
        for transform, parameters in steps:
            image = transform(image, draws, **parameters)
        yield sample._replace(image=image)


def _collate(recipe: Recipe, samples: Iterator[Sample]) -> Iterator[Batch]:
    for first in samples:
        work = first.work
        members = [first, *islice(samples, len(work.numbers) - 1)]
        images = torch.empty((len(members), *first.image.shape), dtype=torch.uint8, pin_memory=recipe.pinned)
        pixels = images.numpy()
        for row, sample in enumerate(members):
            if sample.image.shape != first.image.shape:
                raise UserError(
                    f"pictures of different sizes in one batch: {first.key!r} {_size(first)}, "
                    f"{sample.key!r} {_size(sample)} (height, width, channels)",
                    mend="end the transforms with one that fixes the size: random_resized_crop, center_crop",
                    code="CONFIG",
                )
            pixels[row] = sample.image
        targets = torch.tensor([sample.target for sample in members], dtype=torch.int64)
        valid = torch.full((len(members),), work.valid)
        yield Batch(work, images, targets, valid, [sample.key for sample in members])


def _size(sample: Sample) -> str:
    return " x ".join(map(str, sample.image.shape))


class _Ended:
    """Put last into a worker's queue, with the exception that ended it, if one did."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def _in_turn(shares: list[webdataset.DataPipeline], prefetch: int) -> Generator[Batch, None, None]:
    """Run each pipeline in a thread; take one batch from each in turn until the first of them has no more."""
    stop = threading.Event()
    queues: list[queue.Queue[Batch | _Ended]] = [queue.Queue(prefetch) for _ in shares]
    threads = [
        threading.Thread(target=_fill, args=(share, ready, stop), name=f"reader-{number}", daemon=True)
        for number, (share, ready) in enumerate(zip(shares, queues, strict=True))
    ]
    for thread in threads:
        thread.start()
    try:
        while True:
            for ready in queues:
                item = ready.get()
                if isinstance(item, _Ended):
                    if item.error is not None:
                        raise item.error
                    return
                yield item
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=10)


def _fill(share: webdataset.DataPipeline, ready: queue.Queue[Batch | _Ended], stop: threading.Event) -> None:
    ended = _Ended(None)
    batches = iter(share)
    try:
        for batch in batches:
            if not _put(ready, batch, stop):
                return
    except BaseException as error:  # whatever it is, the main thread must hear of it or it waits for ever
        ended = _Ended(error)
    finally:
        batches.close()
    _put(ready, ended, stop)


def _put(ready: queue.Queue[Batch | _Ended], item: Batch | _Ended, stop: threading.Event) -> bool:
    """Wait for room; False once nobody takes any more."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
