"""What a run says of itself before its first step and after its last."""

from __future__ import annotations

from collections.abc import Callable

from training.job import Job
from training.parameter_groups import describe_groups

Say = Callable[[str], None]


def introduce(job: Job, say: Say) -> None:
    """Network, data, task, machine and plan, a line each."""
    config = job.config
    processes, batch = job.accelerator.num_processes, config.train.global_batch
    parameters = sum(parameter.numel() for parameter in job.network.parameters())
    training = job.dataset.split(config.data.train_split).samples
    held_out = job.dataset.split(config.data.val_split).samples if config.data.val_split else 0
    say(f"network   {config.model.name}, {parameters / 1e6:.1f} M parameters, {config.train.precision}")
    for line in job.loaded.lines() if job.loaded else []:
        say(f"          {line}")
    for line in describe_groups(job.optimizer):
        say(f"learns    {line}")
    say(f"data      {config.data.location}, {training:,} samples to learn from, {held_out:,} held out")
    kind = "grey" if job.dataset.channels == 1 else "colour"
    what = "labels" if config.task == "multilabel" else "classes"
    losses = " + ".join([*config.loss.terms, *config.loss.own])
    say(f"task      {config.task}, {len(job.dataset.classes)} {what}, {kind} pictures, loss {losses}")
    say(
        f"machine   {processes} process{'es' * (processes > 1)} on {job.accelerator.device.type}, "
        f"{config.data.workers} reader {config.data.worker_kind} each"
    )
    say(
        f"plan      {batch} samples a step ({-(-batch // processes)} a process), "
        f"{job.plan.steps_per_epoch} steps an epoch, {job.last_step} in all"
    )
    state = f"resumed at step {job.progress.step}" if job.progress.step else "new"
    say(f"run       {job.request.run_dir} ({state})")


def conclude(job: Job, say: Say) -> None:
    """The best score, and where everything is."""
    run_dir, best = job.request.run_dir, job.progress.best
    if best is not None:
        where = "in training" if best.metric == "train_loss" else "on the held-out samples"
        say(f"{best.metric:<9} {best.value:.4f} {where} (best, after step {best.step})")
    say(f"processes {job.accelerator.num_processes}")
    say(f"run       {run_dir}")
    say(f"plots     {run_dir / 'plots'}")
    # None is the best where the score that chooses was never defined.
    say(f"weights   {run_dir / 'weights' / ('best' if best else 'last')}.safetensors")
