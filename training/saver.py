"""Saves a running job: what goes into a checkpoint, who waits for it, and what is done when it fails."""

from __future__ import annotations

import time
from dataclasses import replace
from enum import IntEnum
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.disk import activity
from training.cadence import kept_every
from training.checkpoints.retention import Retention
from training.checkpoints.snapshot import layout_of
from training.checkpoints.storage_failures import FailedSaves, tell_of_room, warn
from training.checkpoints.tensor_file import Tensors
from training.checkpoints.weight_copies import WeightCopies
from training.checkpoints.writer import CheckpointWriter, Plan
from training.exact.machine import machine_facts
from training.job import Job
from training.journal import Journal
from training.optim import optimizer_numbers
from training.process import Ended
from training.save_times import SaveTimes
from training.state import AVERAGE_FILE, MODEL_FILE, OPTIMIZER_FILE, optimizer_tensors, plan_identity
from training.weights import about_model

SLICE = 1.0  # seconds that the others wait for process zero at a time, however long its disk takes


class _State(IntEnum):
    """Of process zero's disk, as it tells the others."""

    FREE = 0
    MOVING = 1  # a save is under way
    STUCK = 2  # nothing was written since the last look
    LOST = 3  # the run has to end


class Saver:
    """Saves for process zero; every process calls every method, and the others write nothing."""

    def __init__(self, job: Job, journal: Journal) -> None:
        self._job, self._journal = job, journal
        self._main = job.accelerator.is_main_process
        checkpoint, run_dir = job.config.checkpoint, job.request.run_dir
        self._folder = run_dir / "checkpoints"
        self._writer = CheckpointWriter(self._folder, Retention(checkpoint.keep, kept_every(job)))
        self._failures = FailedSaves(self._folder, most=checkpoint.max_failures)
        self._copies = WeightCopies(run_dir / "weights", MODEL_FILE if job.average is None else AVERAGE_FILE)
        self._plan = plan_identity(job.config, job.dataset)  # hashes the whole index: once, not at every save
        self._reserved = False
        self._tried_again = False
        self._times = SaveTimes(run_dir)
        if self._main:
            self._copies.remove_leftovers()
        if self._main and job.progress.step:
            self._owe_outdated(self._folder / f"step-{job.progress.step:08d}")

    def between_steps(self) -> None:
        """After a step: get the memory for copies, now that the optimizer has its state; look after saves."""
        if not self._main:
            return
        if not self._reserved:
            self._reserved = True
            layouts = {
                file: {name: layout_of(tensor) for name, tensor in tensors.items()}
                for file, tensors in self._tensors().items()
            }
            self._writer.reserve(layouts, then=lambda: tell_of_room(self._folder, self._writer.size))
        self._listen()

    @property
    def lost(self) -> bool:
        """Whether this process knows that the run has to end: the next `save` will say so to all."""
        return self._main and self._failures.too_many

    def save(self, *, best: bool) -> None:
        """Begin a checkpoint of everything up to here; returns once the tensors are copied.

        STORAGE where too many saves in a row have failed.
        """
        self._settle(last=False)
        if self._main:
            self._begin(best=best)

    def export(self, checkpoint: Path, *, best: bool) -> None:
        """Copy a committed checkpoint's weights to where a user takes them away."""
        if self._main:
            names = self._names(self._job.progress.step, best=best)
            self._copies.owe(checkpoint, names, about=about_model(self._job))
            self._copies.pay()

    def close(self, *, asked: float | None = None) -> None:
        """Wait for the last checkpoint; STORAGE where it or the weights fail twice.

        `asked`: time.monotonic() when a signal asked for it.
        """
        self._settle(last=True)
        if self._main and asked is not None:
            self._times.stopped(time.monotonic() - asked)

    def _begin(self, *, best: bool) -> None:
        job = self._job
        job.progress = replace(job.progress, metrics_bytes=self._journal.length)
        scaler, step = job.accelerator.scaler, job.progress.step
        names, about = self._names(step, best=best), about_model(job)

        def copy_weights(committed: Path) -> list[int]:
            self._copies.owe(committed, names, about=about)
            return self._copies.pay()

        state = {
            "progress": job.progress.as_json(),
            "optimizer": optimizer_numbers(job.optimizer),
            "plan": self._plan,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "made_by": {
                "processes": job.accelerator.num_processes,
                **machine_facts(job.accelerator.device),
            },
        }
        best_step = job.progress.best.step if job.progress.best else None
        self._tried_again = False
        self._writer.save(Plan(step, state, best_step, self._journal.commit, copy_weights), self._tensors())

    def _tensors(self) -> dict[str, Tensors]:
        job = self._job
        files: dict[str, Tensors] = {
            MODEL_FILE: {name: tensor.detach() for name, tensor in job.network.state_dict().items()},
            OPTIMIZER_FILE: optimizer_tensors(job.optimizer, job.names),
        }
        if job.average is not None:
            files[AVERAGE_FILE] = dict(job.average.module.state_dict())
        return files

    def _names(self, step: int, *, best: bool) -> list[str]:
        job, every = self._job, self._job.weights_every_steps
        kept = [f"epoch-{step // job.plan.steps_per_epoch:04d}"] if every and step % every == 0 else []
        return ["last", *(["best"] if best else []), *kept]

    def _owe_outdated(self, checkpoint: Path) -> None:
        """A kill between a checkpoint and its copies left the copies of the one before."""
        best = self._job.progress.best
        step = self._job.progress.step
        names = self._names(step, best=best is not None and best.step == step)
        if names := self._copies.outdated(checkpoint, names):
            self._copies.owe(checkpoint, names, about=about_model(self._job))

    def _settle(self, *, last: bool) -> None:
        """Wait until nothing is being written; every process comes here after the same step.

        The others ask process zero again and again instead of waiting for it in one collective, which a slow
        disk would let run into its time-out. While something is written, that is a sign of life.
        """
        while (state := self._agreed(last=last)) in (_State.MOVING, _State.STUCK):
            if state is _State.MOVING:
                self._job.place.at()
        if state is _State.LOST:
            raise self._ended()

    def _agreed(self, *, last: bool) -> _State:
        accelerator = self._job.accelerator
        state = self._state(last=last) if self._main else _State.FREE
        if accelerator.num_processes == 1:
            return state
        told = torch.tensor(int(state), device=accelerator.device)
        dist.broadcast(told, src=0)
        return _State(int(told))

    def _state(self, *, last: bool) -> _State:
        """Process zero's; at the end of the run what failed is tried once more."""
        before = activity.done
        if self._writer.busy(SLICE):
            return _State.MOVING if activity.done > before else _State.STUCK
        self._listen()
        if self._failures.too_many:
            return _State.LOST
        if last and self._failures.last_failed:
            if self._tried_again:
                return _State.LOST
            self._tried_again = True
            self._writer.again()
            return _State.MOVING
        if last and self._copies.owed and self._copies.pay():
            return _State.LOST
        return _State.FREE

    def _listen(self) -> None:
        """Take note of how the last save ended, if it has."""
        outcome = self._writer.outcome()
        if outcome is None:
            return
        if isinstance(outcome.error, OSError):
            self._failures.failed(outcome.error, needed=self._writer.size, newest=self._writer.newest)
        elif outcome.error is not None:
            raise outcome.error
        else:
            self._failures.succeeded()
            self._times.saved(outcome.seconds)
        if outcome.unpruned is not None:
            warn(f"an older checkpoint could not be removed: {outcome.unpruned}")

    def _ended(self) -> Ended:
        if self._failures.last_failed or not self._main:
            return self._failures.ended()
        files = " and ".join(f"weights/{name}.safetensors" for name in self._copies.owed)
        hint = "make room or mend the disk, then start the same command again: the checkpoint is whole"
        return Ended("STORAGE", f"error: {files} could not be written", hint=hint)
