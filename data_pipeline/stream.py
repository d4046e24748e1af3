"""Delivers the micro-batches of a plan in its order, read ahead by threads or by processes.

The order depends on neither their number, nor their kind, nor their speed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from itertools import chain, islice
from threading import local
from typing import Literal

import torch

from data_pipeline.batch import Batch, Mixed
from data_pipeline.file_reader import PictureList
from data_pipeline.partners import wanted
from data_pipeline.pixel_rows import pixel_bytes
from data_pipeline.plan import Work
from data_pipeline.prefetch import Prefetcher
from data_pipeline.produce import Filled, Producer, Recipe
from data_pipeline.reader_processes import filled_by_processes
from data_pipeline.slots import Slots

Kind = Literal["threads", "processes"]
Delivered = tuple[int, Filled]  # the slot that holds its pixels
Beside = Callable[[], AbstractContextManager[object]]  # what runs while readers do

AHEAD = 32  # shards behind a URL that are fetched before they are needed, as far as the cache has room


def stream(
    recipe: Recipe, work: Callable[[], Iterator[Work]], *, workers: int, prefetch: int, kind: Kind = "threads"
) -> Generator[Batch, None, None]:
    """Yield the batches that `work()` asks for, in its order; each is there until the next one is asked for.

    `workers` threads or processes read ahead, `prefetch` batches each; 0 reads in the calling thread.
    Close the iterator (or exhaust it) to end them. An exception in a worker is raised here, at its batch.
    """
    works = work()
    first = next(works, None)
    if first is None:
        return
    shared = kind == "processes" and workers > 0
    # One batch is with the caller while the workers fill the others.
    slots = Slots(workers * prefetch + 1, _capacity(recipe, first), shared=shared, pinned=recipe.pinned)
    fetcher = _Fetcher(recipe, work)
    everything = chain([first], works)
    if workers == 0:
        source = _filled_here(recipe, everything, slots, beside=fetcher.beside)
    elif shared:
        source = filled_by_processes(
            recipe, everything, slots, workers=workers, prefetch=prefetch, beside=fetcher.beside
        )
    else:
        source = _filled_by_threads(
            recipe, everything, slots, workers=workers, prefetch=prefetch, beside=fetcher.beside
        )
    with closing(source):
        for slot, filled in source:
            yield _batch(filled, slots.tensor(slot))
            slots.release(slot)
            fetcher.taken()


class _Fetcher:
    """Has shards behind a URL fetched before they are needed; does nothing for a folder of this machine."""

    def __init__(self, recipe: Recipe, work: Callable[[], Iterator[Work]]) -> None:
        self._recipe, self._work = recipe, work
        self._done = 0
        self._prefetcher: Prefetcher | None = None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Fetch what comes after the batches that were taken so far, until the end."""
        recipe = self._recipe
        if isinstance(recipe.store, PictureList):
            yield
            return
        numbers = (wanted(one).numbers for one in islice(self._work(), self._done, None))
        split = recipe.dataset.split(recipe.split)
        self._prefetcher = Prefetcher(recipe.store, split, numbers, ahead=AHEAD, sharers=recipe.sharers)
        try:
            yield
        finally:
            self._prefetcher.close()

    def taken(self) -> None:
        """One more batch was taken."""
        self._done += 1
        if self._prefetcher is not None:
            self._prefetcher.taken()


def _capacity(recipe: Recipe, first: Work) -> int:
    """Bytes of the largest micro-batch, which is the first, judged by its first sample that is whole."""
    size = 0
    with closing(Producer(recipe)) as producer:
        for row in range(len(first.numbers)):
            one = first._replace(
                numbers=first.numbers[row : row + 1], copies=None, partners=None, partner_copies=None
            )
            filled = producer(one)
            size = pixel_bytes(len(first.numbers), filled.shape, masked=filled.masked)
            if size:
                break
    return size


def _filled_here(
    recipe: Recipe, works: Iterator[Work], slots: Slots, *, beside: Beside
) -> Generator[Delivered, None, None]:
    with closing(Producer(recipe)) as producer, beside():
        for work in works:
            slot = slots.take()
            yield slot, producer(work, slots.array(slot))


def _filled_by_threads(
    recipe: Recipe, works: Iterator[Work], slots: Slots, *, workers: int, prefetch: int, beside: Beside
) -> Generator[Delivered, None, None]:
    """Threads share the cores while the caller leaves them the interpreter; the C decoders release it."""
    own = local()
    producers: list[Producer] = []

    def fill(work: Work, slot: int) -> Filled:
        if not hasattr(own, "producer"):
            own.producer = Producer(recipe)
            producers.append(own.producer)
        filled: Filled = own.producer(work, slots.array(slot))
        return filled

    pool = ThreadPoolExecutor(workers, thread_name_prefix="reader")
    under_way: deque[tuple[int, Future[Filled]]] = deque()
    try:
        with beside():
            while True:
                while len(under_way) < workers * prefetch and (work := next(works, None)) is not None:
                    slot = slots.take()
                    under_way.append((slot, pool.submit(fill, work, slot)))
                if not under_way:
                    return
                slot, future = under_way.popleft()
                yield slot, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for producer in producers:
            producer.close()


def _batch(filled: Filled, slot: torch.Tensor) -> Batch:
    """Torch views of a micro-batch: its pixels lie in a slot, or elsewhere where that was too small."""
    count, shape = len(filled.keys), filled.shape
    memory = slot if filled.private is None else torch.from_numpy(filled.private)
    size = pixel_bytes(count, shape, masked=False)
    images = memory[:size].view(count, *shape)
    mixed = None
    if filled.targets is None:
        targets = memory[size : size + count * shape[0] * shape[1]].view(count, *shape[:2])
    else:
        targets = torch.from_numpy(filled.targets)
        if filled.partner_targets is not None and filled.share is not None:
            mixed = Mixed(torch.from_numpy(filled.partner_targets), torch.from_numpy(filled.share))
    valid = torch.full((count,), filled.work.valid)
    return Batch(
        filled.work, images, targets, valid, filled.keys, filled.bad, mixed, filled.sizes, filled.blank
    )
