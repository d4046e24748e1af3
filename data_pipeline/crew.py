"""Runs jobs in processes that say how far they are, never outlive us, and whose death is noticed at once."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

from data_pipeline.fault import UserError
from data_pipeline.lifeline import die_with_parent

REPORT_EVERY = 0.2  # seconds between two reports of a worker
AGAIN = "start again; if memory ran out, give fewer: --workers 1"
AHEAD = 3  # jobs a worker that `in_order` may have begun or finished before their result is asked for

Job = TypeVar("Job")
Result = TypeVar("Result")
Tick = Callable[[], object]


class _Done(NamedTuple):
    """A worker's answer when a job is done, or (without a number) when it is ready for its first."""

    number: int | None = None
    result: Any = None


class _DeathError(UserError):
    """A worker is dead."""


class _Worker:
    """A process at the other end of a pipe. Spawned, not forked: threads of ours would not survive a fork."""

    def __init__(self, do: Callable[[Any, Tick], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, do), daemon=True)
        self.process.start()
        theirs.close()  # or the pipe would not end with the process
        self.number: int | None = None

    def give(self, number: int, job: object) -> None:
        self.number = number
        self.pipe.send((number, job))


def run_jobs(
    do: Callable[[Job, Tick], object],
    jobs: Sequence[Job],
    *,
    workers: int,
    progress: Callable[[int], object],
    describe: Callable[[Job], str],
    again: str = AGAIN,
) -> None:
    """Call `do(job, tick)` for each job, in any order; `progress` is told how often `tick` was called.

    Each worker is sent its own job only, when it is free. The first exception of a job is raised here, DATA
    where a worker dies; the others are then killed, as they are by Ctrl-C; `again` says how to mend it.
    """
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            do(job, lambda: progress(1))
        return
    last = len(jobs)
    answers = _finished(do, jobs, workers=workers, progress=progress, describe=describe, until=lambda: last)
    try:
        for _ in answers:
            pass
    except _DeathError as error:
        raise UserError(error.what, mend=again) from None


def in_order(
    do: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int, describe: Callable[[Job], str]
) -> Iterator[Result]:
    """Yield `do(job)` for each job, in the order of the jobs; what goes wrong is told as in `run_jobs`."""
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from map(do, jobs)
        return
    ready: dict[int, Result] = {}
    wanted = 0
    answers = _finished(
        _Untold(do),
        jobs,
        workers=workers,
        progress=lambda _ticks: None,
        describe=describe,
        until=lambda: wanted + AHEAD * workers,
    )
    with closing(answers):
        for done in answers:
            ready[done.number or 0] = done.result
            while wanted in ready:
                yield ready.pop(wanted)
                wanted += 1


class _Untold(Generic[Job, Result]):
    """A job that tells nothing of how far it is."""

    def __init__(self, do: Callable[[Job], Result]) -> None:
        self._do = do

    def __call__(self, job: Job, _tick: Tick) -> Result:
        return self._do(job)


def _finished(
    do: Callable[[Job, Tick], object],
    jobs: Sequence[Job],
    *,
    workers: int,
    progress: Callable[[int], object],
    describe: Callable[[Job], str],
    until: Callable[[], int],
) -> Generator[_Done, None, None]:
    """Yield each answer as it comes; jobs from number `until()` on are not given out yet."""
    given = 0
    crew: list[_Worker] = []
    idle: list[_Worker] = []
    try:
        with _deaf_to_interrupts():
            for _ in range(min(workers, len(jobs))):
                crew.append(_Worker(do))
        by_pipe = {worker.pipe: worker for worker in crew}
        starting = len(crew)
        while starting or given < len(jobs) or len(idle) < len(crew):
            for pipe in connection.wait([worker.pipe for worker in crew if worker not in idle]):
                assert isinstance(pipe, Connection)
                worker = by_pipe[pipe]
                try:
                    done = _hear(worker, progress)
                except (EOFError, ConnectionError):
                    raise _death(worker, jobs, describe, len(crew)) from None
                if done is None:
                    continue
                idle.append(worker)
                starting -= done.number is None
                if done.number is not None:
                    yield done
            while idle and given < min(len(jobs), until()):
                worker = idle.pop()
                try:
                    worker.give(given, jobs[given])
                except ConnectionError:
                    raise _death(worker, jobs, describe, len(crew)) from None
                given += 1
    finally:
        for worker in crew:
            worker.process.kill()  # nothing is lost: all results are here, or none is wanted any more
        for worker in crew:
            worker.process.join()
            worker.pipe.close()


def _hear(worker: _Worker, progress: Callable[[int], object]) -> _Done | None:
    """The worker's answer if it is free now; EOFError where it is dead."""
    try:
        answer = worker.pipe.recv()
    except OSError:
        raise EOFError from None  # it died in the middle of a word
    if isinstance(answer, int):
        progress(answer)
        return None
    if isinstance(answer, OSError | UserError):
        raise answer
    if isinstance(answer, str):
        raise RuntimeError(f"a worker process failed:\n{answer}")
    assert isinstance(answer, _Done)
    return answer


def _death(worker: _Worker, jobs: Sequence[Job], describe: Callable[[Job], str], count: int) -> _DeathError:
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"was killed from outside ({signal.Signals(-code).name})" if code < 0 else f"ended with {code}"
    at = f" at {describe(jobs[worker.number])}" if worker.number is not None else ""
    return _DeathError(f"a worker process {how}{at}, with {count} of them at work", mend=AGAIN)


def _serve(pipe: Connection, do: Callable[[Any, Tick], Any]) -> None:
    """In the worker: do what comes, until it is killed, or the other end of the pipe is gone."""
    die_with_parent(signal.SIGKILL)
    with suppress(EOFError, ConnectionError):
        _work(pipe, do)


def _work(pipe: Connection, do: Callable[[Any, Tick], Any]) -> None:
    """A number back counts ticks."""
    unsaid, said = 0, time.monotonic()

    def tick() -> None:
        nonlocal unsaid, said
        unsaid += 1
        if time.monotonic() - said > REPORT_EVERY:
            pipe.send(unsaid)
            unsaid, said = 0, time.monotonic()

    pipe.send(_Done())
    while True:
        number, job = pipe.recv()
        try:
            result = do(job, tick)
            pipe.send(unsaid)
            unsaid = 0
            pipe.send(_Done(number, result))
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
