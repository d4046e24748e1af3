"""Hears the signals that ask a launcher to stop, and that a child has ended, when the launcher looks."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Asked(Exception):
    """A stop was asked for while nothing was running."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopSignals:
    """Signals heard within the block; SIGHUP is left alone where it was ignored before: nohup."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self._taken = 0
        self._raises = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        self._awake, told = os.pipe()
        os.set_blocking(self._awake, False)
        os.set_blocking(told, False)
        self._told, self._other = told, signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._hear)
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, self._wake)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave us
        signal.set_wakeup_fd(self._other)
        os.close(self._awake)
        os.close(self._told)

    @property
    def asked(self) -> bool:
        """Whether a stop was asked for."""
        return bool(self.heard)

    @property
    def at_once(self) -> bool:
        """Whether Ctrl-C was pressed again."""
        return self.heard.count(signal.SIGINT) > 1

    def take(self) -> list[int]:
        """Signals heard since the last call."""
        new = self.heard[self._taken :]
        self._taken += len(new)
        return new

    def wait(self, files: Sequence[int], *, seconds: float) -> None:
        """Until a signal comes, a child ends, or something can be read from one of `files`."""
        poll = select.poll()
        for file in (self._awake, *files):
            poll.register(file, select.POLLIN)
        poll.poll(1000 * seconds)
        with contextlib.suppress(BlockingIOError):
            while os.read(self._awake, 4096):
                pass

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Within the block, where nothing runs that they could be passed on to, signals raise Asked."""
        self._raises = True
        try:
            if self.heard:
                raise Asked(self.heard[0])
            yield
        finally:
            self._raises = False

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self.heard.append(number)
        if self._raises:
            raise Asked(number)

    def _wake(self, _number: int, _frame: FrameType | None) -> None:
        """The wakeup descriptor is what counts."""
