"""Whether this process was asked to stop, by a signal or by the clock; all processes then agree on a step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType

from accelerate.utils import gather_object

from training.process import INTERRUPTED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
GRACE = 1.0  # seconds that a process has to leave by itself after the second SIGINT


class StopFlag:
    """Looked at between steps and between the batches of an evaluation; a second SIGINT stops at once.

    `minutes` count from `since` (time.monotonic()). SIGHUP is left alone where it was ignored before: nohup.
    """

    def __init__(self, minutes: float | None = None, *, since: float | None = None) -> None:
        self.signal: int | None = None
        self.heard_at: float | None = None  # time.monotonic() when the first signal was
        self._heard: list[int] = []
        self._minutes = minutes
        self._since = time.monotonic() if since is None else since
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._set)
        _leave_at_the_second_interrupt()

    def _set(self, number: int, _frame: FrameType | None) -> None:
        self._heard.append(number)
        if stops_at_once(self._heard):
            raise KeyboardInterrupt
        self.signal = self.signal or number
        self.heard_at = self.heard_at or time.monotonic()

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop, or its time is over."""
        return bool(self.reason)

    @property
    def reason(self) -> str:
        """Why this process is to stop, in words; empty where it is not."""
        if self.signal is not None:
            return f"on {signal.Signals(self.signal).name}"
        if self._minutes is not None and time.monotonic() - self._since >= 60 * self._minutes:
            return f"after {self._minutes:g} minutes as asked"
        return ""

    def agreed_reason(self) -> str:
        """Why the processes stop, in words; every process comes here."""
        reasons: list[str] = gather_object([self.reason])
        return " and ".join(sorted(set(filter(None, reasons)))) or "on request"


def stops_at_once(heard: Sequence[int]) -> bool:
    """Whether these signals, one after the other, ask for more than a stop at the next step.

    torchrun passes on the first SIGINT, and makes SIGTERM of the second.
    """
    if signal.SIGINT not in heard:
        return False
    after = heard[heard.index(signal.SIGINT) + 1 :]
    return signal.SIGINT in after or ("TORCHELASTIC_RUN_ID" in os.environ and signal.SIGTERM in after)


def _leave_at_the_second_interrupt() -> None:
    """Python runs a handler only once the call into a library that the main thread is in has returned.

    That may take as long as another process takes that is gone; so a thread hears of the signals as well.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def listen() -> None:
        signals = b""
        while not stops_at_once(signals):
            signals += os.read(heard, 64)
        time.sleep(GRACE)
        os._exit(INTERRUPTED)

    threading.Thread(target=listen, name="second-interrupt", daemon=True).start()
