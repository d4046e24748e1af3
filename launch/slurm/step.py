"""Runs one srun of a job to its end: hands signals on, and notices when a node does not answer any more."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from launch.command import Command

HEARD = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
LOOK = 1.0  # seconds
# Seconds between the processes' last word and the end of srun. SLURM kills what is left of them after its
# KillWait, 30 seconds, so only a node that does not answer takes longer.
LOST_AFTER = 60.0
KILL_AFTER = 5.0  # seconds for srun to end its tasks


@dataclass
class Told:
    """What signals have told the job up to now."""

    stop: bool = False
    """to save and stop"""
    terminated: bool = False
    """by SIGTERM: SLURM or a person ends the job"""
    interrupts: int = 0
    """SIGINT, how often: the second ends everything at once"""


class Inbox:
    """Signals of this process, from now on: they interrupt nothing, and are read when it suits."""

    def __init__(self) -> None:
        self._heard, told = os.pipe()
        os.set_blocking(told, False)
        os.set_blocking(self._heard, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        for number in (*HEARD, signal.SIGCHLD):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda _number, _frame: None)

    def wait(self, seconds: float) -> list[int]:
        """What has come, as soon as something has, or after `seconds`."""
        if not select.select([self._heard], [], [], max(0.0, seconds))[0]:
            return []
        return [number for number in os.read(self._heard, 1 << 12) if number in HEARD]


class StepEnd(NamedTuple):
    """How an srun ended."""

    returncode: int
    node_lost: bool
    """whether it had to be ended, because it waited for a node that does not answer"""


def run_step(
    command: Command,
    env: Mapping[str, str],
    inbox: Inbox,
    told: Told,
    *,
    saves: bool,
    spoke: Callable[[], bool],
    look: Callable[[], object],
) -> StepEnd:
    """Start and wait for `command`; `told` grows by what is heard meanwhile.

    `saves`: signals to stop reach the processes as SIGUSR1, which srun hands on; of SIGTERM it would kill
    them. Otherwise there is nothing to save: they go on until the end of the time, or end at once.
    `spoke`: whether the processes have said how they end. `look` is called every second.
    """
    # In a session of its own: what a terminal sends, this process hands on once.
    srun = subprocess.Popen(command.argv, env={**env, **command.variables}, start_new_session=True)
    last_word: float | None = None
    ends_at: float | None = None  # since it was asked to end everything at once
    while srun.poll() is None:
        for number in inbox.wait(LOOK):
            hard = note(told, number, saves=saves)
            if hard:
                ends_at = ends_at or time.monotonic()
                srun.terminate()
            elif saves:
                srun.send_signal(signal.SIGUSR1)
        now = time.monotonic()
        if last_word is None and spoke():
            last_word = now
        if last_word is not None and ends_at is None and now - last_word > LOST_AFTER:
            ends_at = now
            srun.terminate()
        if ends_at is not None and now - ends_at > KILL_AFTER:
            srun.kill()
        look()
    lost = last_word is not None and ends_at is not None and ends_at - last_word > LOST_AFTER
    return StepEnd(srun.returncode, lost)


def note(told: Told, number: int, *, saves: bool) -> bool:
    """Write down a signal; whether everything is to end at once."""
    if number == signal.SIGINT:
        told.interrupts += 1
    if number == signal.SIGTERM:
        told.terminated = True
    # The end of the time is near: who has nothing to save may still be done before.
    told.stop = told.stop or saves or number != signal.SIGUSR1
    return told.interrupts > 1 or (not saves and number != signal.SIGUSR1)
