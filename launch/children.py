"""The processes that a launcher has started, each in a session of its own, and how it sees them out."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from data_pipeline.fault import USER_EXIT
from launch.command import Command
from launch.ends import End, is_bad
from launch.stop_signals import StopSignals
from training.config import UserError

TICK = 0.25  # seconds
LAST_WORDS = 4.0  # seconds for the others to write their stacks and end by themselves, after a failure
AT_ONCE = 2.0  # seconds for the same after the second Ctrl-C

# Of an outer torchrun, which is not the one that starts our processes.
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class Plan(NamedTuple):
    """One process to start."""

    rank: int
    command: Command
    variables: Mapping[str, str]  # that are not to be shown
    files: Sequence[int] = ()  # descriptors that it gets
    prepare: Callable[[], object] | None = None  # runs in it before its program


class Children:
    """They are killed when the block is left, should any still run."""

    def __init__(self) -> None:
        self._running: dict[int, subprocess.Popen[bytes]] = {}  # by rank
        self._ours: set[int] = set()
        self.ends: list[End] = []

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for process in self._running.values():
            process.wait()

    def start(self, plan: Plan) -> None:
        """Start one; USAGE where this machine does not let it."""
        known = {
            name: value
            for name, value in os.environ.items()
            if name not in FOREIGN and not name.startswith("TORCHELASTIC_")
        }
        try:
            self._running[plan.rank] = subprocess.Popen(
                plan.command.argv,
                env={**known, **plan.command.variables, **plan.variables},
                stdin=subprocess.DEVNULL,
                pass_fds=plan.files,
                start_new_session=True,
                preexec_fn=plan.prepare,  # noqa: PLW1509 - no other thread is there yet
            )
        except OSError as error:
            raise UserError(
                f"process {plan.rank} cannot be started: {error.strerror}",
                mend="ulimit -a shows what this machine allows; or start fewer: --processes-per-node",
                code="USAGE",
            ) from None

    @property
    def running(self) -> bool:
        """Whether any has not ended."""
        return bool(self._running)

    @property
    def lowest(self) -> int:
        """The lowest rank of those that have not ended."""
        return min(self._running)

    def collect(self) -> list[End]:
        """Those that have ended since the last call."""
        over = [
            End(rank, process.returncode, rank in self._ours)
            for rank, process in self._running.items()
            if process.poll() is not None
        ]
        for end in over:
            del self._running[end.rank]
        self.ends += over
        return over

    def send(self, number: int) -> None:
        """A signal for each."""
        for process in self._running.values():
            with contextlib.suppress(OSError):
                process.send_signal(number)

    def kill(self) -> None:
        """End those that are left, at once."""
        self._ours |= self._running.keys()
        self.send(signal.SIGKILL)


class Others:
    """What a launcher hears of the launchers of other machines; of one machine alone: nothing."""

    def files(self) -> list[int]:
        """Descriptors on which something may come."""
        return []

    def failing(self) -> None:
        """Tell them that a process here has failed."""

    def failed(self) -> bool:
        """Whether something has failed elsewhere."""
        return False

    def stopping(self) -> None:
        """Tell them that this launcher was asked to stop."""

    def stop(self) -> bool:
        """Whether another one was."""
        return False


def heed(signals: StopSignals, others: Others) -> list[int]:
    """Wait a moment; the signals that came meanwhile, of which the others were told.

    A stop that was asked for elsewhere is one of them.
    """
    signals.wait(others.files(), seconds=TICK)
    if others.stop() and not signals.asked:
        signals.heard.append(signal.SIGTERM)
    if heard := signals.take():
        others.stopping()
    return heard


def see_out(children: Children, signals: StopSignals, others: Others) -> None:
    """Until all have ended: signals are passed on, and who outlives a failure of another is killed."""
    deadline, first = None, children.lowest
    while children.running:
        for number in heed(signals, others):
            children.send(number)
        over = children.collect()
        failed = any(is_bad(end) for end in over)
        if failed:
            others.failing()
        if any(end.code == USER_EXIT and end.rank == first for end in over):
            children.send(signal.SIGTERM)  # they wait for it to say what is wrong, and it has
        now = time.monotonic()
        if deadline is None and (others.failed() or failed):
            deadline = now + LAST_WORDS
        if signals.at_once and (deadline is None or deadline > now + AT_ONCE):
            deadline = now + AT_ONCE
        if deadline is not None and now >= deadline:
            children.kill()
