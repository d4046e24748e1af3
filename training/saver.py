"""Saves a running job: what goes into a checkpoint, and what a user takes away of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from training.checkpoint import CheckpointWriter, step_of
from training.job import Job
from training.journal import Journal
from training.optim import optimizer_numbers
from training.state import AVERAGE_FILE, MODEL_FILE, OPTIMIZER_FILE, optimizer_tensors, plan_identity
from training.weights import about_model, export_weights


class Saver:
    """Saves for process zero; on the others every method runs and writes nothing."""

    def __init__(self, job: Job, journal: Journal) -> None:
        self._job, self._journal = job, journal
        self._writer = CheckpointWriter(job.request.run_dir / "checkpoints", keep=job.config.checkpoint.keep)
        self._plan = plan_identity(job.config, job.dataset)  # hashes the whole index: once, not at every save

    def save(self, *, best: bool) -> None:
        """Begin a checkpoint of everything up to here; returns once the tensors are copied."""
        job = self._job
        if not job.accelerator.is_main_process:
            return
        job.progress = replace(job.progress, metrics_bytes=self._journal.commit())
        scaler = job.accelerator.scaler
        files = {
            MODEL_FILE: {name: tensor.detach() for name, tensor in job.network.state_dict().items()},
            OPTIMIZER_FILE: optimizer_tensors(job.optimizer, job.names),
        }
        if job.average is not None:
            files[AVERAGE_FILE] = dict(job.average.module.state_dict())
        self._writer.save(
            job.progress.step,
            files,
            {
                "progress": job.progress.as_json(),
                "optimizer": optimizer_numbers(job.optimizer),
                "plan": self._plan,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "made_by": {"processes": job.accelerator.num_processes, "threads": torch.get_num_threads()},
            },
            best_step=job.progress.best.step if job.progress.best else None,
            then=self._export(job.progress.step, best=best),
        )

    def export(self, checkpoint: Path, *, best: bool) -> None:
        """Copy a committed checkpoint's weights to where a user takes them away."""
        if self._job.accelerator.is_main_process:
            self._export(step_of(checkpoint), best=best)(checkpoint)

    def _export(self, step: int, *, best: bool) -> Callable[[Path], None]:
        """What copies the checkpoint of `step`, told now what a thread must not read later from the job."""
        job, every = self._job, self._job.weights_every_steps
        names = ["last", *(["best"] if best else [])]
        if every and step % every == 0:
            names.append(f"epoch-{step // job.plan.steps_per_epoch:04d}")
        return partial(
            export_weights,
            folder=job.request.run_dir / "weights",
            about=about_model(job),
            file=MODEL_FILE if job.average is None else AVERAGE_FILE,
            names=names,
        )

    def close(self) -> None:
        """Wait for the last checkpoint."""
        self._writer.wait()
