"""Puts a job together: data set, processes, network, optimizer and what is resumed, in this order."""

from __future__ import annotations

import datetime
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from timm.utils.model_ema import ModelEmaV3

from data_pipeline.fault import UserError
from data_pipeline.index import DatasetIndex
from data_pipeline.plan import Plan
from training.checkpoints.protocol import read_state, read_tensors
from training.command import Request
from training.config import Config
from training.exact.conditions import check_processes, fix_arithmetic
from training.freezing import Freezing, apply_freezing, plan_freezing
from training.gradient_sums import add_up_gradients
from training.hardware import check_gpus, check_visible, local_processes, process_cores
from training.initial_weights import initial_file, load_initial
from training.job import Job, length_of
from training.labels import learned_labels
from training.networks.build import build_network, head_names
from training.networks.options import apply_options
from training.networks.pretrained import LoadReport, load_pretrained
from training.networks.synced_batch_norm import Presence, synchronise
from training.optim import build_optimizer, load_optimizer_numbers
from training.process import Place
from training.process_group import open_group
from training.reading import make_plan
from training.schedules import check_schedule, steps_of
from training.state import (
    AVERAGE_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    Progress,
    load_model,
    load_optimizer,
    parameter_names,
)
from training.tasks import make_task
from training.tasks.task import Kept, Task

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # in accelerate's words


def join(config: Config, *, learning: bool = False, place: Place | None = None) -> Accelerator:
    """Join the other processes and find the device; USAGE and CONFIG where they are not what was asked for.

    With `learning`, exact mode sets its conditions. `place` knows where the processes have met.
    """
    cpu = (
        os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        or not torch.cuda.is_available()
    )
    if not cpu:
        check_visible(torch.cuda.device_count(), local_processes())
    if cpu and config.train.precision == "fp16":
        raise UserError("train.precision: fp16 needs a GPU", mend="use bf16 or fp32", code="CONFIG")
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if learning and config.train.exact:
        check_processes(config, asked)
        fix_arithmetic(cpu=cpu)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(process_cores())
    # Where nobody has said, accelerate gives each of several processes its part of all the machine's cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    # torch renamed this option lately and floors stay low, so the old name has to do; and it remarks on the
    # layout of 1 x 1 convolutions' gradients, which is theirs to choose.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Buffers are not broadcast at every step: training never reads them, and evaluation takes process zero's.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    # Longer than a hang may last: who finds that knows what the others do, a collective knows nothing.
    seconds = max(config.train.timeout_seconds, 60 * config.train.hang_minutes + 30)
    timeout = datetime.timedelta(seconds=seconds)
    if place is not None:
        open_group(place.listener, cpu=cpu, timeout=timeout)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=PRECISIONS[config.train.precision],
        kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=timeout)],
        log_with=None if config.tracking.wandb == "disabled" else "wandb",
    )
    if not cpu:
        _round_products(tf32=config.train.tf32)
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for, {accelerator.num_processes} came together",
            mend="start with torchrun --nproc_per_node N, or accelerate launch --multi_gpu --num_processes N",
            code="USAGE",
        )
    if not cpu and asked > 1:
        check_gpus(accelerator.device)
    return accelerator


def _round_products(*, tf32: bool) -> None:
    """Let GPUs round the factors of fp32 products, or not; torch by itself does in convolutions only."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def assemble(
    request: Request,
    accelerator: Accelerator,
    dataset: DatasetIndex,
    *,
    checkpoint: Path | None,
    progress: Progress,
    place: Place | None = None,
) -> Job:
    """Everything that `loop.train` needs, with weights and optimizer from `checkpoint` if there is one.

    The order matters: weights are loaded before DDP copies process zero's to all, the average is copied
    before anything wraps the network, the optimizer's state is loaded after its parameters have moved.
    """
    config, plan = request.config, make_plan(request.config, dataset)
    labels = learned_labels(config, dataset)
    task = make_task(labels, config.loss)
    _check_scores(config, task)
    check_schedule(config.optim, length_of(config, plan))
    network, head, loaded = _network(request, dataset, task, checkpoint)
    freezing = _freezing(config, plan, network, head)
    apply_freezing(network, freezing.frozen_at(progress.step))
    presence = synchronise(network) if config.train.sync_batchnorm else Presence()
    network.to(accelerator.device)
    average = _average(config, network, checkpoint)
    apply_options(network, config.model)
    trainable, device = freezing.trainable, accelerator.device.type
    optimizer = build_optimizer(network, config.optim, head=head, trainable=trainable, device_type=device)
    # In exact mode gradients are added up without DDP, and a model to evaluate is the one that has none.
    model = accelerator.prepare_model(network, evaluation_mode=config.train.exact)
    optimizer = accelerator.prepare_optimizer(optimizer)
    names = parameter_names(network, optimizer)
    if checkpoint:
        state = read_state(checkpoint)
        load_optimizer(optimizer, names, read_tensors(checkpoint, OPTIMIZER_FILE))
        load_optimizer_numbers(optimizer, state["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
    job = Job(
        request=request,
        accelerator=accelerator,
        dataset=dataset,
        plan=plan,
        task=task,
        labels=labels,
        freezing=freezing,
        model=model,
        network=network,
        average=average,
        optimizer=optimizer,
        names=names,
        head=head,
        progress=progress,
        loaded=loaded,
        place=place or Place(),
        presence=presence,
    )
    add_up_gradients(job.model, job.watch)
    return job


def _network(
    request: Request, dataset: DatasetIndex, task: Task, checkpoint: Path | None
) -> tuple[torch.nn.Module, frozenset[str], LoadReport | None]:
    """The bare network, the names of its head's parameters, and what came from somebody's weights.

    Numbers that are drawn depend on the seed only; training.initial_weights says what goes before what.
    """
    config = request.config
    model, loaded = config.model, None
    asked: dict[str, Any] = {"task": config.task, "channels": dataset.channels, "outputs": task.outputs}
    torch.manual_seed(config.seed)
    network = build_network(model.name, arguments=model.arguments, **asked)
    head = head_names(model.name, arguments=model.arguments, **asked)
    if checkpoint:
        load_model(network, read_tensors(checkpoint, MODEL_FILE), origin=str(checkpoint))
    elif file := initial_file(request):
        loaded = load_initial(network, file, dataset, task=config.task)
    elif model.pretrained:
        loaded = load_pretrained(
            network, model.pretrained, name=model.name, arguments=model.arguments, head=head, **asked
        )
    return network, head, loaded


def _freezing(config: Config, plan: Plan, network: torch.nn.Module, head: frozenset[str]) -> Freezing:
    length = length_of(config, plan)
    unfreeze = {pattern: steps_of(late, length) for pattern, late in config.model.unfreeze.items()}
    parameters = dict(network.named_parameters())
    return plan_freezing(
        list(parameters),
        head=head,
        freeze=config.model.freeze,
        unfreeze=unfreeze,
        fixed=frozenset(name for name, parameter in parameters.items() if not parameter.requires_grad),
    )


def _average(config: Config, network: torch.nn.Module, checkpoint: Path | None) -> ModelEmaV3 | None:
    """The running mean of the weights; its decay grows with the steps up to what was asked for."""
    if not config.train.ema:
        return None
    average = ModelEmaV3(network, decay=config.train.ema, use_warmup=True)
    if checkpoint:
        load_model(average.module, read_tensors(checkpoint, AVERAGE_FILE), origin=str(checkpoint))
    return average


def _check_scores(config: Config, task: Task) -> None:
    """CONFIG where no score has the name that an option gives: now, not after the first epoch."""
    nothing = {name: np.zeros(shape) for name, shape in task.sums.items()}
    rows = np.empty((0, task.outputs))
    kept = Kept(rows.astype(np.float32), rows.astype(np.int8)) if task.keeps_rows else None
    known = ["train_loss"] if config.data.val_split is None else ["loss", *task.score(nothing, kept).metrics]
    named = {"eval.best": config.eval.best}
    if config.train.early_stop is not None:
        named["train.early_stop: metric"] = config.train.early_stop.metric
    for option, name in named.items():
        if name is not None and name not in known:
            what = f"{option}: {name!r} is no score of this run"
            raise UserError(what, mend=f"one of: {', '.join(known)}", code="CONFIG")
