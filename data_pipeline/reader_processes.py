"""Reader processes under torch's DataLoader, which orders and supervises them; only slot numbers travel.

The pixels go through slots that the processes inherited when they were forked, so that no batch costs fresh
shared memory. A process that dies is replaced: what it had under way is read again.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from data_pipeline.fault import UserError
from data_pipeline.lifeline import die_with_parent
from data_pipeline.plan import Work
from data_pipeline.produce import Filled, Producer, Recipe
from data_pipeline.slots import Slots

RESTARTS = 3  # without a single batch in between
WORKER_DIED = "exited unexpectedly"  # how DataLoader's error says so


class _Order(NamedTuple):
    """What a worker is asked for, and where the pixels go."""

    slot: int
    work: Work


class _Failed(NamedTuple):
    """An exception on its way to the main process: a user's mistake as it is, or the text of a traceback."""

    error: UserError | None
    text: str


class _Reader:
    """What DataLoader takes for a map-style data set: its "index" is an order."""

    def __init__(self, recipe: Recipe, slots: Slots) -> None:
        self._recipe, self._slots = recipe, slots
        self._producer: Producer | None = None

    def __getitem__(self, order: _Order) -> Filled | _Failed:
        if self._producer is None:
            self._producer = Producer(self._recipe)
        try:
            return self._producer(order.work, self._slots.array(order.slot))
        except UserError as error:
            return _Failed(error, "")
        except Exception:
            return _Failed(None, traceback.format_exc())


class _Orders:
    """Hands out orders to DataLoader, which asks for one whenever a batch has come back; remembers them."""

    def __init__(self, works: Iterator[Work], slots: Slots) -> None:
        self._works, self._slots = works, slots
        self.under_way: deque[_Order] = deque()
        self._again: deque[_Order] = deque()

    def __iter__(self) -> Iterator[_Order]:
        while True:
            if self._again:
                order = self._again.popleft()
            elif (work := next(self._works, None)) is not None:
                order = _Order(self._slots.take(), work)
            else:
                return
            self.under_way.append(order)
            yield order

    def start_over(self) -> None:
        """Hand out again, in order, what was under way."""
        self._again = self.under_way + self._again
        self.under_way = deque()


def filled_by_processes(
    recipe: Recipe,
    works: Iterator[Work],
    slots: Slots,
    *,
    workers: int,
    prefetch: int,
    beside: Callable[[], AbstractContextManager[object]],
) -> Generator[tuple[int, Filled], None, None]:
    """The slot and the rest of each batch, in order; a worker's exception is raised at its batch.

    `beside` is entered while the workers run, never while they are forked: what it starts may have threads.
    """
    orders = _Orders(works, slots)
    reader = _Reader(recipe, slots)
    deaths = 0
    while True:
        batches = _started(reader, orders, workers=workers, prefetch=prefetch)
        slots.lock_pages()
        try:
            with beside():
                for answer in batches:
                    order = orders.under_way.popleft()
                    if isinstance(answer, _Failed):
                        raise answer.error or RuntimeError(f"a reader process failed:\n{answer.text}")
                    deaths = 0
                    yield order.slot, answer
            return
        except RuntimeError as error:
            deaths += 1
            if WORKER_DIED not in str(error) or deaths > RESTARTS:
                raise
            orders.start_over()
        finally:
            batches._shutdown_workers()  # now, not when the garbage collector comes by
            slots.unlock_pages()


def _started(reader: _Reader, orders: _Orders, *, workers: int, prefetch: int) -> Any:
    """A running DataLoader iterator. Forked: workers start in milliseconds and inherit the slots."""
    heard = signal.getsignal(signal.SIGCHLD)
    gc.collect()
    gc.freeze()  # what the children inherit stays shared with them: their collector will not touch it
    try:
        with warnings.catch_warnings():
            # More readers than cores are the user's choice. A fork beside threads goes wrong where they hold
            # locks that the children need: ours hold none.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")
            loader: DataLoader[Any] = DataLoader(
                reader,  # type: ignore[arg-type]  # anything with __getitem__ serves, as torch's documentation says
                sampler=orders,
                batch_size=None,
                num_workers=workers,
                prefetch_factor=prefetch,
                collate_fn=_as_it_is,
                worker_init_fn=_begin,
                multiprocessing_context="fork",
                generator=torch.Generator(),  # or it would draw from the global one, from which dropout draws
            )
            return iter(loader)
    finally:
        gc.unfreeze()
        # torch's handler raises wherever the main thread is, in the middle of a step; without it a death is
        # noticed where the next batch is waited for, and there it can be mended.
        with contextlib.suppress(ValueError):  # not in the main thread, where torch sets no handler either
            signal.signal(signal.SIGCHLD, heard)


def _begin(_worker: int) -> None:
    """In a new worker: its life is tied to the parent's, and signals to stop are the parent's business."""
    die_with_parent(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(filled: Any) -> Any:
    return filled
