"""`--dry-run`: the configuration, network and plan, and two real steps; nothing is written."""

from __future__ import annotations

import resource
import time

import torch
from accelerate import Accelerator

from data_pipeline.index import DatasetIndex
from training.assembly import assemble
from training.command import Request
from training.console import Console
from training.parameter_groups import describe_groups
from training.reading import training_batches
from training.state import Progress
from training.step import take_step

STEPS = 2


def rehearse(request: Request, accelerator: Accelerator, dataset: DatasetIndex) -> None:
    """Print what a run with this request would be, and take two optimizer steps of it."""
    config = request.config
    say = Console(active=accelerator.is_main_process, every_seconds=1).say
    say(config.as_yaml().rstrip())
    job = assemble(request, accelerator, dataset, checkpoint=None, progress=Progress())
    plan = job.plan
    parameters = sum(parameter.numel() for parameter in job.network.parameters())
    modules = len(list(job.network.modules()))
    say(f"\nnetwork   {config.model.name}: {parameters:,} parameters in {modules} modules")
    for line in job.loaded.lines() if job.loaded else []:
        say(f"          {line}")
    for line in describe_groups(job.optimizer):
        say(f"learns    {line}")
    dropped = plan.samples - plan.steps_per_epoch * plan.global_batch
    say(
        f"plan      {plan.samples:,} samples, {plan.steps_per_epoch} steps an epoch of {plan.global_batch}, "
        f"{dropped} left over each epoch (others each time), {plan.lanes} lanes"
    )
    steps = range(min(STEPS, plan.steps_per_epoch))
    started = time.monotonic()
    batches = training_batches(config, dataset, plan, accelerator, steps=steps)
    job.learn()
    for step in steps:
        mean = float(job.task.objective.value(take_step(job, batches, step).report().sums))
        say(f"step {step + 1}    loss {mean:.4f}")
    batches.close()
    say(f"time      {time.monotonic() - started:.1f} s for {len(steps)} steps, with start-up")
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    device = torch.cuda.max_memory_allocated() / 2**30 if accelerator.device.type == "cuda" else 0
    say(
        f"memory    {host:.2f} GiB of the host"
        + (f", {device:.2f} GiB of the GPU" if device else "")
        + " at most"
    )
    say("dry run: nothing was written")
