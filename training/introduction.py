"""What a run says of itself before its first step and after its last."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch
from accelerate.utils import gather_object

from data_pipeline.disk import file_sha256
from training.accounting import Machine, Spent, account
from training.exact.conditions import listed
from training.exact.sum_tree import process_counts
from training.hardware import hardware_lines, process_cores
from training.job import Job
from training.parameter_groups import describe_groups

Say = Callable[[str], None]


def introduce(job: Job, say: Say) -> None:
    """Network, data, task, machine and plan, a line each."""
    config = job.config
    processes, batch = job.accelerator.num_processes, config.train.global_batch
    share = -(-batch // processes)
    parameters = sum(parameter.numel() for parameter in job.network.parameters())
    training = job.dataset.split(config.data.train_split).samples
    held_out = job.dataset.split(config.data.val_split).samples if config.data.val_split else 0
    say(f"network   {config.model.name}, {parameters / 1e6:.1f} M parameters, {_precision(job)}")
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
    for line in hardware_lines(job.accelerator.device, os.environ):
        say(f"          {line}")
    say(
        f"plan      {batch} samples a step ({share} a process), "
        f"{job.plan.steps_per_epoch} steps an epoch, {job.last_step} in all"
    )
    if config.train.sync_batchnorm and (pieces := -(-share // (config.train.micro_batch or share))) > 1:
        say(f"norm      BatchNorm sees one micro-batch of all processes at a time, of {pieces} in a step")
    if config.train.exact:
        own, counts = config.grains // processes, listed(process_counts(config.grains))
        say(f"exact     {config.grains} grains of {config.grain} samples ({own} a process)")
        say(f"          the same bits on {counts} of machines like this")
    state = f"resumed at step {job.progress.step}" if job.progress.step else "new"
    say(f"run       {job.request.run_dir} ({state})")


def _precision(job: Job) -> str:
    train = job.config.train
    rounded = train.tf32 and job.accelerator.device.type == "cuda"
    return f"{train.precision} with products in tf32" if rounded else train.precision


def time_lines(job: Job) -> list[str]:
    """What the time of this start went into, over all processes; every process comes here."""
    job.watch.read(job.watch.lap())
    everyone = gather_object([Spent(socket.gethostname(), job.watch.totals)])
    machine = Machine(
        device=job.accelerator.device.type,
        processes=job.accelerator.num_processes,
        cores=process_cores(),
        threads=torch.get_num_threads(),
    )
    return account(everyone, job.config, machine)


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
    weights = run_dir / "weights" / f"{'best' if best else 'last'}.safetensors"
    say(f"weights   {weights}")
    if job.config.train.exact:
        say(f"sha256    {file_sha256(weights)}")
