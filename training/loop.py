"""Trains: one optimizer step is one global batch, and everything else happens between steps."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from data_pipeline.batch import BadSample, Batch
from data_pipeline.draws import hash64
from training.assembly import Job
from training.counts import SharedSums, batch_digest, digest_parts
from training.evaluation import evaluate
from training.inputs import Normalizer, forward
from training.optim import rate_at
from training.process import Ended, Place, StopFlag
from training.reading import training_batches
from training.recorder import Recorder
from training.reduction import settle_reduction
from training.run_directory import Start


class Taken(NamedTuple):
    """What one process has of a step."""

    sums: torch.Tensor  # float64: loss, elements, stop, broken samples, digest parts; to be added up over all
    bad: list[BadSample]


def train(job: Job, start: Start, place: Place) -> None:
    """Run from where the job stands to its last step; STOPPED and NONFINITE end it before."""
    recorder, flag = Recorder(job, start), StopFlag()
    if start.checkpoint is not None and _evaluation_is_owed(job):
        recorder.export(start.checkpoint, best=_evaluate(job, recorder))
    steps = range(job.progress.step, job.last_step)
    if steps:
        _train_steps(job, recorder, flag, place, steps)
    recorder.close()
    recorder.conclude()


def _train_steps(job: Job, recorder: Recorder, flag: StopFlag, place: Place, steps: range) -> None:
    normalize = Normalizer(job.dataset, job.accelerator.device)
    stream = training_batches(job.config, job.dataset, job.plan, job.accelerator, steps=steps)
    first = next(stream)
    job.model.train()
    settle_reduction(job.model, job.task, normalize(first), job.accelerator)
    batches = itertools.chain([first], stream)
    recorder.work_begins()
    under_way: tuple[int, SharedSums] | None = None
    with contextlib.closing(stream):
        for step in steps:
            place.step = step
            taken = _take_step(job, normalize, batches, flag, step)
            sums = SharedSums(taken.sums)
            recorder.skipped(step, taken.bad)
            # A step's sums travel while the next one computes: they are read one step late, or at a pause.
            stop = under_way is not None and recorder.step(under_way[0], under_way[1].result())
            under_way = (step, sums)
            if stop or _pauses_after(job, step):
                stop = recorder.step(step, sums.result()) or stop
                under_way = None
                job.progress.step = step + 1
                _pause(job, recorder, evaluating=_evaluates_after(job, step) and not stop)
                recorder.work_begins()
            if stop:
                recorder.close()
                what = f"stopped on request after step {step + 1}"
                raise Ended("STOPPED", what, hint="start the same command again to go on")


def _take_step(job: Job, normalize: Normalizer, batches: Iterator[Batch], flag: StopFlag, step: int) -> Taken:
    """One optimizer step."""
    accelerator, config = job.accelerator, job.config
    for group in job.optimizer.param_groups:
        group["lr"] = rate_at(step, config.optim, steps=job.schedule_steps)
    # Dropout draws from a generator that is set anew for every step, so there is no state of it to save.
    torch.manual_seed(hash64(f"dropout {config.seed} {step} {accelerator.process_index}".encode()))
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    bad: list[BadSample] = []
    digest, last = 0, False
    while not last:
        batch = next(batches)
        assert batch.work.step == step, (batch.work.step, step)
        last = batch.last
        bad += batch.bad
        inputs = normalize(batch)
        if config.debug.batch_digest != "none":
            digest += batch_digest(batch, inputs, pixels=config.debug.batch_digest == "pixels")
        with contextlib.nullcontext() if last else accelerator.no_sync(job.model):
            with accelerator.autocast():
                outputs = forward(job.model, inputs.images)
            loss = job.task.batch_loss(outputs, inputs)
            # Divided by the *global* count. DDP averages over processes, so their number is put back.
            accelerator.backward(loss.total * (accelerator.num_processes / config.train.global_batch))
        sums += torch.stack([loss.total.detach(), loss.elements])
    if config.optim.clip_norm is not None:
        accelerator.clip_grad_norm_(job.model.parameters(), config.optim.clip_norm)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    rest = [float(flag.signal is not None), float(len(bad)), *digest_parts(digest)]
    return Taken(torch.cat([sums, torch.tensor(rest, dtype=torch.float64, device=accelerator.device)]), bad)


def _evaluates_after(job: Job, step: int) -> bool:
    every = job.config.eval.every_epochs * job.plan.steps_per_epoch
    return (step + 1) % every == 0 or step + 1 == job.last_step


def _pauses_after(job: Job, step: int) -> bool:
    every = job.config.checkpoint.every_steps
    return _evaluates_after(job, step) or bool(every and (step + 1) % every == 0)


def _evaluation_is_owed(job: Job) -> bool:
    """Whether the run was stopped between a step and the evaluation that belongs behind it."""
    done = job.progress.step
    return done > 0 and _evaluates_after(job, done - 1) and job.progress.evaluated != done


def _pause(job: Job, recorder: Recorder, *, evaluating: bool) -> None:
    """Evaluate if it is time, and save; every process comes here after the same step."""
    recorder.save(best=evaluating and _evaluate(job, recorder))


def _evaluate(job: Job, recorder: Recorder) -> bool:
    """Score the validation split after the steps done so far; whether it is the best of the run."""
    scores = evaluate(job.network, job.task, job.config, job.dataset, job.accelerator)
    job.progress.evaluated = job.progress.step
    return recorder.evaluation(scores)
