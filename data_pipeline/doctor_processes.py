"""Runs one function over many jobs in processes; the results come in the order of the jobs."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from data_pipeline.fault import UserError
from data_pipeline.lifeline import die_with_parent

AHEAD = 3  # jobs a process that may be finished or at work before their result is asked for: it is in memory

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_order(
    do: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int, describe: Callable[[Job], str]
) -> Iterator[Result]:
    """Yield `do(job)` for each job; DATA, which `describe`s the first without result, where a process dies.

    Spawned, not forked: other threads' locks do not survive a fork.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from map(do, jobs)
        return
    waiting = deque(jobs)
    running: deque[tuple[Job, Future[Result]]] = deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin)
    others = multiprocessing.active_children()
    try:
        while waiting or running:
            while waiting and len(running) < AHEAD * workers:
                running.append((waiting[0], _submitted(pool, do, waiting.popleft())))
            yield running[0][1].result()
            running.popleft()
    except BrokenProcessPool:
        behind = f" or one of the {len(running) - 1} behind it" if len(running) > 1 else ""
        raise UserError(
            f"one of {workers} processes was killed or crashed, at {describe(running[0][0])}{behind}",
            mend="if memory ran out, give fewer: --workers 1",
        ) from None
    finally:
        for worker in multiprocessing.active_children():
            if worker not in others:  # nothing is lost: all results are here, or none is wanted any more
                worker.terminate()
        pool.shutdown(cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, do: Callable[[Job], Result], job: Job) -> Future[Result]:
    """Workers inherit deafness to Ctrl-C, to which each would answer with a traceback; we end them."""
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return pool.submit(do, job)
    finally:
        signal.signal(signal.SIGINT, heard)


def _begin() -> None:
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
