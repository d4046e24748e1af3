"""Runs jobs in processes that say how far they are, never outlive us, and whose death is noticed at once."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

from data_pipeline.fault import UserError
from data_pipeline.lifeline import die_with_parent

REPORT_EVERY = 0.2  # seconds between two reports of a worker

Job = TypeVar("Job")
Tick = Callable[[], object]


class _Worker(Generic[Job]):
    """A process at the other end of a pipe. Spawned, not forked: threads of ours would not survive a fork."""

    def __init__(self, do: Callable[[Job, Tick], object]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, do), daemon=True)
        self.process.start()
        theirs.close()  # or the pipe would not end with the process
        self.job: Job | None = None

    def give(self, job: Job | None) -> None:
        self.job = job
        self.pipe.send(job)


def run_jobs(
    do: Callable[[Job, Tick], object],
    jobs: Sequence[Job],
    *,
    workers: int,
    progress: Callable[[int], object],
    describe: Callable[[Job], str],
) -> None:
    """Call `do(job, tick)` for each job, in any order; `progress` is told how often `tick` was called.

    Each worker is sent its own job only, when it is free. The first exception of a job is raised here, DATA
    where a worker dies; the other workers are then killed, as they are by Ctrl-C.
    """
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            do(job, lambda: progress(1))
        return
    waiting = deque(jobs)
    crew: list[_Worker[Job]] = []
    try:
        with _deaf_to_interrupts():
            for _ in range(min(workers, len(jobs))):
                crew.append(_Worker(do))
        at_work = {worker.pipe: worker for worker in crew}
        while at_work:
            for pipe in connection.wait(list(at_work)):
                assert isinstance(pipe, Connection)
                worker = at_work[pipe]
                try:
                    if not _hear(worker, progress):
                        continue
                    worker.give(waiting.popleft() if waiting else None)
                except (EOFError, ConnectionError):
                    raise _death(worker, describe, len(crew)) from None
                if worker.job is None:
                    del at_work[pipe]
    finally:
        for worker in crew:
            worker.process.kill()  # nothing to one that is through
        for worker in crew:
            worker.process.join()
            worker.pipe.close()


def _hear(worker: _Worker[Job], progress: Callable[[int], object]) -> bool:
    """Whether the worker is free now; EOFError where it is dead."""
    try:
        answer = worker.pipe.recv()
    except OSError:
        raise EOFError from None  # it died in the middle of a word
    if isinstance(answer, int):
        progress(answer)
        return False
    if isinstance(answer, OSError | UserError):
        raise answer
    if isinstance(answer, str):
        raise RuntimeError(f"a packing process failed:\n{answer}")
    return True


def _death(worker: _Worker[Job], describe: Callable[[Job], str], count: int) -> UserError:
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"was killed from outside ({signal.Signals(-code).name})" if code < 0 else f"ended with {code}"
    at = f" at {describe(worker.job)}" if worker.job is not None else ""
    return UserError(
        f"a packing process {how}{at}, with {count} of them at work",
        mend="start again, it goes on where it stopped; if memory ran out, give fewer: --workers 1",
    )


def _serve(pipe: Connection, do: Callable[[Job, Tick], object]) -> None:
    """In the worker: do what comes, until None comes. A None back says "free", a number counts ticks."""
    die_with_parent(signal.SIGKILL)
    unsaid, said = 0, time.monotonic()

    def tick() -> None:
        nonlocal unsaid, said
        unsaid += 1
        if time.monotonic() - said > REPORT_EVERY:
            pipe.send(unsaid)
            unsaid, said = 0, time.monotonic()

    pipe.send(None)
    while (job := pipe.recv()) is not None:
        try:
            do(job, tick)
            pipe.send(unsaid)
            unsaid = 0
            pipe.send(None)
        except (OSError, UserError) as error:
            pipe.send(error)
        except Exception:
            pipe.send(traceback.format_exc())


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """What is started here never hears Ctrl-C, on which each would print a traceback; we hear it after."""
    resource_tracker.ensure_running()  # its start would end the deafness
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
