"""Ends a process at once that is asked to stop before its training has begun: there is nothing to save yet.

Its main thread may be waiting inside of a library for the other processes, where Python runs no handler of a
signal; so a thread hears of the signals, and says the process's last words.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence

from training.process import end_early
from training.vigil.ending import Ended
from training.vigil.place import Place

EARLY_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def stop_before_training(words: Sequence[str], place: Place) -> None:
    """From now on, until training looks for itself, signals to stop end this process with STOPPED.

    Only where its command line asks to train: what evaluates or predicts begins anew the next time. SIGINT
    is an exception from now on, unless a shell has it ignored; SIGHUP stays ignored where it was: nohup.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if words and words[0] in ("evaluate", "predict"):
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    for number in EARLY_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: None)
    threading.Thread(target=_listen, args=(heard, place), name="early-signals", daemon=True).start()


def _listen(heard: int, place: Place) -> None:
    while data := os.read(heard, 64):
        for number in data:
            if number in EARLY_SIGNALS:
                end_early(place, _stopped(signal.Signals(number)))


def _stopped(sign: signal.Signals) -> Ended:
    what = f"stopped on {sign.name}, before training began: nothing is lost"
    return Ended("STOPPED", what, hint="start the same command again to go on")
