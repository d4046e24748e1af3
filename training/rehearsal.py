"""`--dry-run`: the configuration, network and plan, and two real steps; nothing is written."""

from __future__ import annotations

import resource
import time

import torch
from accelerate import Accelerator

from data_pipeline.index import DatasetIndex
from training.assembly import make_network, make_plan, training_batches
from training.command import Request
from training.console import Console
from training.inputs import Normalizer
from training.optim import build_optimizer
from training.tasks import TASKS

STEPS = 2


def rehearse(request: Request, accelerator: Accelerator, dataset: DatasetIndex) -> None:
    """Print what a run with this request would be, and take two optimizer steps of it."""
    config = request.config
    say = Console(active=accelerator.is_main_process, every_seconds=1).say
    say(config.as_yaml().rstrip())
    task = TASKS[config.task](len(dataset.classes))
    network = make_network(config, dataset, task)
    model, optimizer = accelerator.prepare(network, build_optimizer(network, config.optim))
    plan, normalize = make_plan(config, dataset), Normalizer(dataset, accelerator.device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    modules = len(list(network.modules()))
    say(f"\nnetwork   {config.model.name}: {parameters:,} parameters in {modules} modules")
    dropped = plan.samples - plan.steps_per_epoch * plan.global_batch
    say(
        f"plan      {plan.samples:,} samples, {plan.steps_per_epoch} steps an epoch of {plan.global_batch}, "
        f"{dropped} left over each epoch (others each time), {plan.lanes} lanes"
    )
    steps = range(min(STEPS, plan.steps_per_epoch))
    started = time.monotonic()
    for batch in training_batches(config, dataset, plan, accelerator, steps=steps):
        inputs = normalize(batch)
        with accelerator.autocast():
            loss = task.loss(model(inputs.images), inputs.targets, inputs.valid)
        accelerator.backward(loss.total / loss.elements.clamp(min=1))
        if batch.last:
            optimizer.step()
            optimizer.zero_grad()
            mean = float(loss.total / loss.elements.clamp(min=1))
            say(
                f"step {batch.work.step + 1}    last micro-batch {list(inputs.images.shape)}, loss {mean:.4f}"
            )
    say(f"time      {time.monotonic() - started:.1f} s for {len(steps)} steps, with start-up")
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    device = torch.cuda.max_memory_allocated() / 2**30 if accelerator.device.type == "cuda" else 0
    say(
        f"memory    {host:.2f} GiB of the host"
        + (f", {device:.2f} GiB of the GPU" if device else "")
        + " at most"
    )
    say("dry run: nothing was written")
