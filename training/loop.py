"""Trains: one optimizer step is one global batch, and everything else happens between steps.

B samples of a *global* batch; a micro-batch is a part of a process's share of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from data_pipeline.batch import Batch
from training.assembly import Job, training_batches
from training.counts import SharedSums, batch_digest, digest_parts, joined_digest
from training.evaluation import describe, evaluate
from training.inputs import Normalizer
from training.optim import rate_at
from training.plots import draw_plots
from training.process import Ended, Place
from training.state import MODEL_FILE, OPTIMIZER_FILE, Best, optimizer_tensors, plan_identity
from training.tracking import track
from training.weights import exporter


def train(job: Job, place: Place) -> None:
    """Run from where the job stands to its last step; STOPPED and NONFINITE end it before."""
    _introduce(job)
    start, steps = job.progress.step, job.last_step
    batches = training_batches(job.config, job.dataset, job.plan, job.accelerator, steps=range(start, steps))
    normalize = Normalizer(job.dataset, job.accelerator.device)
    job.console.begin(step=start, steps=steps, samples=start * job.config.train.global_batch)
    job.model.train()
    pending: tuple[int, SharedSums] | None = None
    for step in range(start, steps):
        place.step = step
        sums = SharedSums(_take_step(job, normalize, batches, step))
        # The sums of a step travel while the next one computes; they are read one step late, or before a pause.
        stop = _finish_step(job, *pending) if pending else False
        pending = (step, sums)
        if _pauses_after(job, step) or stop:
            stop = _finish_step(job, *pending) or stop
            pending = None
            _pause(job, step, evaluating=_evaluates_after(job, step) and not stop)
        if stop:
            job.checkpoints.wait()
            job.console.end()
            raise Ended("STOPPED", f"stopped on request after step {step + 1}", hint="start again to go on")
    batches.close()  # type: ignore[attr-defined]  # an iterator over a DataPipeline or our threads: both close
    job.checkpoints.wait()
    job.console.end()
    _conclude(job)


def _take_step(job: Job, normalize: Normalizer, batches: Iterator[Batch], step: int) -> torch.Tensor:
    """One optimizer step; this process's part of its sums, float64: loss, count, stop, digest in 16-bit parts."""
    accelerator, config = job.accelerator, job.config
    rate = rate_at(step, config.optim, steps=job.schedule_steps)
    for group in job.optimizer.param_groups:
        group["lr"] = rate
    # Dropout draws from a generator that is set anew for every step, so there is no state of it to save.
    torch.manual_seed((config.seed * 1_000_003 + step) * 65_537 + accelerator.process_index)
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    count = torch.zeros_like(loss_sum)
    digest = 0
    last = False
    while not last:
        batch = next(batches)
        assert batch.work.step == step, (batch.work.step, step)
        last = batch.last
        inputs = normalize(batch)
        if config.debug.batch_digest != "none":
            digest += batch_digest(batch, inputs.images, inputs.targets, pixels=config.debug.batch_digest == "pixels")
        with contextlib.nullcontext() if last else accelerator.no_sync(job.model):
            with accelerator.autocast():
                outputs = job.model(inputs.images)
            loss = job.task.loss(outputs, inputs.targets, inputs.valid)
            # DDP averages over processes, so their number is put back: the gradient is that of the global mean.
            accelerator.backward(loss.total * (accelerator.num_processes / config.train.global_batch))
        loss_sum += loss.total.detach()
        count += loss.count
    if config.optim.clip_norm is not None:
        accelerator.clip_grad_norm_(job.model.parameters(), config.optim.clip_norm)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    rest = torch.tensor([float(job.stop.signal is not None), *digest_parts(digest)], dtype=torch.float64)
    return torch.cat([torch.stack([loss_sum, count]), rest.to(accelerator.device)])


def _finish_step(job: Job, step: int, sums: SharedSums) -> bool:
    """Record a step whose sums have arrived; whether any process was asked to stop."""
    loss_sum, count, stop, *digest = sums.result()
    config, done = job.config, step + 1
    loss, rate = loss_sum / count, rate_at(step, config.optim, steps=job.schedule_steps)
    epoch, samples = step // job.plan.steps_per_epoch, done * config.train.global_batch
    if not math.isfinite(loss):
        job.console.end()
        raise Ended(
            "NONFINITE",
            f"error: the loss of step {done} is {loss}",
            hint="lower --optim.lr, warm up for longer, or set --optim.clip-norm 1; then start with --fresh",
        )
    if done % config.log.every_steps == 0 or done == job.last_step:
        proof = {} if config.debug.batch_digest == "none" else {"batch_digest": joined_digest(digest)}
        job.journal.write("train", step=done, epoch=epoch, samples=samples, loss=loss, lr=rate, **proof)
        track(job.accelerator, done, {"train/loss": loss, "train/lr": rate})
    job.console.step(step=done, steps=job.last_step, epoch=epoch, loss=loss, lr=rate, samples=samples)
    return stop > 0


def _evaluates_after(job: Job, step: int) -> bool:
    every = job.config.eval.every_epochs * job.plan.steps_per_epoch
    return (step + 1) % every == 0 or step + 1 == job.last_step


def _pauses_after(job: Job, step: int) -> bool:
    every = job.config.checkpoint.every_steps
    return _evaluates_after(job, step) or bool(every and (step + 1) % every == 0)


def _pause(job: Job, step: int, *, evaluating: bool) -> None:
    """Evaluate if it is time, and save; every process comes here after the same step."""
    job.progress.step = step + 1
    best = _evaluate(job, step) if evaluating else False
    if job.accelerator.is_main_process:
        job.progress = replace(job.progress, metrics_bytes=job.journal.commit())
        _save(job, best=best)


def _evaluate(job: Job, step: int) -> bool:
    """Score the validation split and record it; whether it is the best so far."""
    scores = evaluate(job.network, job.task, job.config, job.dataset, job.accelerator)
    metric, epoch = job.task.primary, step // job.plan.steps_per_epoch
    job.journal.write("eval", step=step + 1, epoch=epoch, **scores.as_json())
    track(job.accelerator, step + 1, {f"eval/{name}": value for name, value in scores.metrics.items()})
    shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.metrics.items())
    job.console.say(f"validation after epoch {epoch + 1}, step {step + 1}: {shown}  ({describe(scores.certificate)})")
    value, before = scores.metrics[metric], job.progress.best
    if before is not None and value <= before.value:
        return False
    job.progress.best = Best(step + 1, metric, value)
    return True


def _save(job: Job, *, best: bool) -> None:
    scaler = job.accelerator.scaler
    job.checkpoints.save(
        job.progress.step,
        {
            MODEL_FILE: {name: tensor.detach() for name, tensor in job.network.state_dict().items()},
            OPTIMIZER_FILE: optimizer_tensors(job.optimizer, job.names),
        },
        {
            "progress": job.progress.as_json(),
            "plan": plan_identity(job.config, job.dataset),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "made_by": {"processes": job.accelerator.num_processes, "threads": torch.get_num_threads()},
        },
        best_step=job.progress.best.step if job.progress.best else None,
        then=exporter(job.request.run_dir, job.config, job.dataset, best=best),
    )


def _introduce(job: Job) -> None:
    """Say what is about to happen."""
    config, accelerator = job.config, job.accelerator
    share = -(-config.train.global_batch // accelerator.num_processes)
    millions = sum(parameter.numel() for parameter in job.network.parameters()) / 1e6
    training, held_out = job.dataset.split(config.data.train_split), job.dataset.split(config.data.val_split)
    resumed = f"resumed at step {job.progress.step}" if job.progress.step else "new"
    processes = f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
    job.console.say(f"network   {config.model.name}, {millions:.1f} M parameters, {config.train.precision}")
    job.console.say(
        f"data      {config.data.root}: {training.samples:,} samples to learn from, {held_out.samples:,} held out, "
        f"{len(job.dataset.classes)} classes"
    )
    job.console.say(f"machine   {processes} on {accelerator.device.type}, {config.data.workers} reader threads each")
    job.console.say(
        f"plan      {config.train.global_batch} samples a step ({share} a process), {job.plan.steps_per_epoch} steps "
        f"an epoch, {job.last_step} steps in all"
    )
    job.console.say(f"run       {job.request.run_dir} ({resumed})")


def _conclude(job: Job) -> None:
    """Draw the plots and say where everything is."""
    run_dir, best = job.request.run_dir, job.progress.best
    if not job.accelerator.is_main_process:
        return
    draw_plots(run_dir)
    job.console.say("")
    if best is not None:
        job.console.say(f"{best.metric:<9} {best.value:.4f} on the held-out samples (best, after step {best.step})")
    job.console.say(f"processes {job.accelerator.num_processes}")
    job.console.say(f"run       {run_dir}")
    job.console.say(f"plots     {run_dir / 'plots'}")
    job.console.say(f"weights   {run_dir / 'weights' / 'best.safetensors'}")
