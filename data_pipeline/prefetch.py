"""Fetches the tars of a remote data set before a process comes to read them, in the order of its plan."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from data_pipeline.draws import IntArray
from data_pipeline.fault import UserError
from data_pipeline.index import Split
from data_pipeline.store import RemoteFolder, Store
from data_pipeline.transfer import StoppedError

WINDOW = 256  # micro-batches after which a shard that has not come again may have left the cache
HORIZON = 1024  # micro-batches that the thread looks ahead


class Coming(NamedTuple):
    """A shard that is needed: its position in the split, and by which of the arrays first."""

    array: int
    position: int


def shards_in_order(
    numbers: Iterable[IntArray], shard_ends: IntArray, *, window: int = WINDOW
) -> Iterator[Coming]:
    """Each shard when an array of sample numbers first needs it, and again when `window` arrays did without.

    `shard_ends` [S] are cumulative samples, as np.cumsum(split.shard_samples).
    """
    last: dict[int, int] = {}
    for array, wanted in enumerate(numbers):
        for position in np.unique(np.searchsorted(shard_ends, wanted, side="right")).tolist():
            if array - last.get(position, -window - 1) > window:
                yield Coming(array, position)
            last[position] = array
        if array % window == window - 1:
            last = {position: seen for position, seen in last.items() if array - seen <= window}


class Prefetcher:
    """A thread that keeps the next few shards of a split in the cache; it does nothing for a local folder.

    `numbers` are the sample numbers of this process's micro-batches in the order in which they will be taken;
    `taken` says that one of them was. What is fetched but not needed yet is at most `ahead` shards and half
    of the cache's bytes divided by the `sharers` (processes of this machine that prefetch), so it is not
    evicted before it is read. What cannot be fetched is left to the reader, which meets the error itself.

    Start it after worker processes are forked: a fork copies whatever its thread has half done.
    """

    def __init__(
        self, store: Store, split: Split, numbers: Iterable[IntArray], *, ahead: int, sharers: int = 1
    ) -> None:
        self._split, self._ahead = split, ahead
        self._stop, self._moved = threading.Event(), threading.Condition()
        self._taken = 0
        self._ready: deque[Coming] = deque()  # fetched, or about to be, and not needed yet
        self._thread: threading.Thread | None = None
        if isinstance(store, RemoteFolder) and ahead > 0:
            self._most = store.cache.budget // (2 * sharers)
            self._thread = threading.Thread(
                target=self._run, args=(store, numbers), name="prefetch", daemon=True
            )
            self._thread.start()

    def taken(self) -> None:
        """Say that one more micro-batch was taken: the shards that were ready for it make room for others."""
        with self._moved:
            self._taken += 1
            while self._ready and self._ready[0].array < self._taken:
                self._ready.popleft()
            self._moved.notify()

    def close(self) -> None:
        """End the thread; where a server keeps it waiting it ends later, but nothing waits for it."""
        self._stop.set()
        with self._moved:
            self._moved.notify()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def _run(self, store: RemoteFolder, numbers: Iterable[IntArray]) -> None:
        ends = np.cumsum(self._split.shard_samples)
        try:
            for coming in shards_in_order(self._near(numbers), ends):
                shard = self._split.shards[coming.position]
                self._wait_for_room(coming)
                if coming.array >= self._taken and shard.bytes <= self._most:
                    with suppress(UserError, OSError):
                        store.prefetch(shard, self._stop)
        except (StoppedError, UserError, OSError):
            return  # what the plan itself could not read, the main thread meets at the same place

    def _near(self, numbers: Iterable[IntArray]) -> Iterator[IntArray]:
        """Not too far into the plan: where everything is in the cache, nothing else would hold the thread."""
        for array, wanted in enumerate(numbers):
            self._wait_until_near(array)
            yield wanted

    def _wait_until_near(self, array: int) -> None:
        self._wait(lambda: array < self._taken + HORIZON)

    def _wait_for_room(self, coming: Coming) -> None:
        size = self._size(coming)

        def has_room() -> bool:
            held = sum(map(self._size, self._ready))
            return len(self._ready) < self._ahead and held + size <= self._most

        self._wait(lambda: coming.array < self._taken or has_room())
        with self._moved:
            if coming.array >= self._taken:
                self._ready.append(coming)

    def _size(self, coming: Coming) -> int:
        return min(self._split.shards[coming.position].bytes, self._most)

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._moved:
            self._moved.wait_for(lambda: self._stop.is_set() or condition())
        if self._stop.is_set():
            raise StoppedError
