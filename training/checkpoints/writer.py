"""Writes checkpoints in a thread: training waits only while the tensors are copied."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from training.checkpoints.priority import step_back
from training.checkpoints.protocol import (
    checkpoints,
    remove_checkpoint,
    remove_leftovers,
    step_of,
    write_checkpoint,
)
from training.checkpoints.retention import Retention, dispensable
from training.checkpoints.snapshot import Layout, Snapshot
from training.checkpoints.tensor_file import Tensors

# In levels of priority. Beside busy cores alone the writer still gets a tenth of one: enough to finish.
BEHIND_TRAINING = 10


class Plan(NamedTuple):
    """One save: what of it is not tensors, and what goes before and after it, in the thread."""

    step: int
    state: dict[str, Any]
    best_step: int | None
    before: Callable[[], object]  # whatever must be on the disk first; OSError fails the save
    then: Callable[[Path], Any]  # gets the committed folder; steps that must stay nevertheless


class Outcome(NamedTuple):
    """How a save ended."""

    step: int
    error: BaseException | None  # None: it is committed and was read back
    unpruned: OSError | None  # why older ones could not be removed
    seconds: float  # since it was asked for


class CheckpointWriter:
    """Writes checkpoints of one run below `folder`, one at a time, and removes those that are dispensable."""

    def __init__(self, folder: Path, retention: Retention) -> None:
        self._folder, self._retention = folder, retention
        self._snapshot = Snapshot()
        self._plan: Plan | None = None
        self._asked = 0.0  # time.monotonic() at the last `save`
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None

    @property
    def size(self) -> int:
        """Bytes of the tensors of a checkpoint, as far as is known."""
        return self._snapshot.size

    @property
    def newest(self) -> str | None:
        """Name of the newest checkpoint in the folder."""
        return next((path.name for path in checkpoints(self._folder)), None)

    def reserve(self, layouts: Mapping[str, Mapping[str, Layout]], then: Callable[[], None]) -> None:
        """Get the memory for tensors of such layouts in the background; `then` is called with it at hand."""

        def work() -> None:
            with contextlib.suppress(RuntimeError):  # too little memory: the save itself will say so
                self._snapshot.reserve(layouts)
                then()

        self._start(work)

    def save(self, plan: Plan, files: Mapping[str, Tensors]) -> None:
        """Copy the tensors and write them in the background; waits for the save before this one."""
        self.busy(None)
        self._asked = time.monotonic()
        self._snapshot.take(files)
        self._plan = plan
        self.again()

    def again(self) -> None:
        """Write the snapshot of the last save once more."""
        self.busy(None)
        assert self._plan is not None
        plan = self._plan
        self._start(lambda: self._write(plan))

    def busy(self, seconds: float | None) -> bool:
        """Whether the thread still works after waiting so long for it (None: until it does not)."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return True
            self._thread = None
        return False

    def outcome(self) -> Outcome | None:
        """How the last save ended, told once; None while it is under way."""
        if self.busy(0):
            return None
        told, self._outcome = self._outcome, None
        return told

    def _start(self, work: Callable[[], None]) -> None:
        self.busy(None)

        def begin() -> None:
            step_back(BEHIND_TRAINING)
            work()

        self._thread = threading.Thread(target=begin, name="checkpoint-writer")
        self._thread.start()

    def _write(self, plan: Plan) -> None:
        unpruned = None
        try:
            plan.before()
            committed = write_checkpoint(self._folder, plan.step, self._snapshot.files, plan.state)
            wanted = {step for step in (plan.best_step, *(plan.then(committed) or ())) if step is not None}
            unpruned = self._prune(plan.step, wanted)
        except BaseException as error:  # for the thread that trains, which asks for the outcome
            self._outcome = Outcome(plan.step, error, None, time.monotonic() - self._asked)
        else:
            self._outcome = Outcome(plan.step, None, unpruned, time.monotonic() - self._asked)

    def _prune(self, written: int, wanted: set[int]) -> OSError | None:
        try:
            remove_leftovers(self._folder)
            there = {step_of(path): path for path in checkpoints(self._folder)}
            for step in dispensable(there.keys(), self._retention, written=written, wanted=wanted):
                remove_checkpoint(there[step])
        except OSError as error:
            return error
        return None
