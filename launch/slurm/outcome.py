"""How the processes of an srun ended, from its exit code and from what they wrote themselves; pure."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from data_pipeline.fault import USER_EXIT
from launch.attempts import Outcome, exit_code_of, name_of
from launch.ends import INTERRUPTED, PIPE_CLOSED, STOPPED
from launch.slurm.step import StepEnd, Told
from training.vigil.ending import EXIT_CODES

CRASH = EXIT_CODES["CRASH"]


def outcome_of(end: StepEnd, failure: Mapping[str, Any] | None, told: Told, *, saves: bool) -> Outcome:
    """How a start ended; `failure`: its RUN/failure.json, `saves`: whether its processes save when asked to.

    srun's exit code is the greatest of its tasks' or 128 + a signal, so what was written goes before it.
    """
    if end.returncode == 0:
        return Outcome(0)
    if told.interrupts > 1:
        return Outcome(INTERRUPTED, what="interrupted twice")
    if failure is not None:
        return Outcome(exit_code_of(failure["code"]), failure["code"], failure["what"], failure["rank"])
    if end.returncode in (USER_EXIT, INTERRUPTED, PIPE_CLOSED) or name_of(end.returncode):
        return Outcome(end.returncode, name_of(end.returncode))
    return _unsaid(end.returncode, told, saves=saves)


def _unsaid(code: int, told: Told, *, saves: bool) -> Outcome:
    """Where no process has said why."""
    if told.stop and not saves:
        return Outcome(128 + signal.SIGTERM, what="ended as asked")
    by = -code if code < 0 else max(0, code - 128)
    if told.stop and by in (signal.SIGUSR1, signal.SIGTERM):
        # The signal came before srun, or the processes, were ready for it.
        return Outcome(STOPPED, "STOPPED", "stopped before training began")
    name = f"signal {by} ({signal.Signals(by).name})" if by in set(signal.Signals) else f"signal {by}"
    if code < 0:
        return Outcome(CRASH, "CRASH", f"error: srun was killed by {name}")
    if by:
        return Outcome(CRASH, "CRASH", f"error: a process was killed by {name}, as srun says")
    return Outcome(CRASH, "CRASH", f"error: srun ended with exit code {code}")
