"""Puts a job together: data set, processes, network, optimizer and what is resumed, in this order."""

from __future__ import annotations

import datetime
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from data_pipeline.fault import UserError
from data_pipeline.index import DatasetIndex
from data_pipeline.plan import Plan
from training.checkpoint import read_state, read_tensors
from training.command import Request
from training.config import Config
from training.networks.classifiers import classifier
from training.optim import build_optimizer
from training.reading import make_plan
from training.state import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    Progress,
    load_model,
    load_optimizer,
    parameter_names,
)
from training.tasks import TASKS
from training.tasks.task import Task

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # in accelerate's words


@dataclass
class Job:
    """Everything that training needs; `model` is wrapped for the processes, `network` the bare one in it."""

    request: Request
    accelerator: Accelerator
    dataset: DatasetIndex
    plan: Plan
    task: Task
    model: torch.nn.Module
    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    names: list[str]  # of the optimizer's parameters
    progress: Progress

    @property
    def config(self) -> Config:
        """What the run was told."""
        return self.request.config

    @property
    def schedule_steps(self) -> int:
        """Optimizer steps that the learning rate's course spans."""
        train = self.config.train
        return train.epochs * self.plan.steps_per_epoch if train.epochs else train.max_steps or 0

    @property
    def last_step(self) -> int:
        """Optimizer steps after which the run ends."""
        return min(self.schedule_steps, self.config.train.max_steps or self.schedule_steps)


def join(config: Config) -> Accelerator:
    """Find the other processes and the device; USAGE and CONFIG where they are not what was asked for."""
    cpu = (
        os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        or not torch.cuda.is_available()
    )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not cpu and local > torch.cuda.device_count():
        raise UserError(
            f"{local} processes on this machine, which has {torch.cuda.device_count()} GPUs",
            mend="start one process per GPU, or set ACCELERATE_USE_CPU=true to train on the CPU",
            code="USAGE",
        )
    if cpu and (config.train.precision == "fp16" or config.train.sync_batchnorm):
        wrong = "train.precision: fp16" if config.train.precision == "fp16" else "train.sync_batchnorm: true"
        raise UserError(
            f"{wrong} needs a GPU", mend="use bf16 or fp32, and sync_batchnorm false", code="CONFIG"
        )
    if cpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    # torch renamed this option lately and floors stay low, so the old name has to do; and it remarks on the
    # layout of 1 x 1 convolutions' gradients, which is theirs to choose.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Buffers are not broadcast at every step: training never reads them, and evaluation takes process zero's.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=config.train.timeout_seconds))
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=PRECISIONS[config.train.precision],
        kwargs_handlers=[ddp, timeout],
        log_with=None if config.tracking.wandb == "disabled" else "wandb",
    )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for, {accelerator.num_processes} came together",
            mend="start with torchrun --nproc_per_node N, or accelerate launch --multi_gpu --num_processes N",
            code="USAGE",
        )
    return accelerator


def make_network(config: Config, dataset: DatasetIndex, task: Task) -> torch.nn.Module:
    """The network with initial weights that depend on the seed only."""
    torch.manual_seed(config.seed)
    model = config.model
    return classifier(
        model.name, channels=dataset.channels, outputs=task.outputs, pretrained=model.pretrained
    )


def assemble(
    request: Request,
    accelerator: Accelerator,
    dataset: DatasetIndex,
    *,
    checkpoint: Path | None,
    progress: Progress,
) -> Job:
    """Everything that `loop.train` needs, with weights and optimizer from `checkpoint` if there is one.

    The order matters: weights are loaded before DDP copies process zero's to all, the optimizer's state after
    its parameters have moved to the device.
    """
    config = request.config
    task = TASKS[config.task](len(dataset.classes))
    network = make_network(config, dataset, task)
    if checkpoint:
        load_model(network, read_tensors(checkpoint, MODEL_FILE), origin=str(checkpoint))
    model = network
    if config.train.sync_batchnorm:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    model, optimizer = accelerator.prepare(model, build_optimizer(model, config.optim))
    network = accelerator.unwrap_model(model)
    names = parameter_names(network, optimizer)
    if checkpoint:
        load_optimizer(optimizer, names, read_tensors(checkpoint, OPTIMIZER_FILE))
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(read_state(checkpoint)["scaler"])
    plan = make_plan(config, dataset)
    return Job(request, accelerator, dataset, plan, task, model, network, optimizer, names, progress)
