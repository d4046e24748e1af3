"""Trains: one optimizer step is one global batch, and everything else happens between steps."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch

from data_pipeline.batch import BadSample, Batch
from training.clipping import clip_gradients
from training.counts import SharedSums, digest_parts
from training.evaluation import evaluate
from training.gradients import accumulate
from training.inputs import Normalizer
from training.job import Job
from training.process import Ended, Place, StopFlag
from training.reading import training_batches
from training.recorder import Recorder
from training.reduction import settle_reduction
from training.run_directory import Start


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
    normalize = job.normalizer
    stream = training_batches(job.config, job.dataset, job.plan, job.accelerator, steps=steps)
    first = next(stream)
    job.learn()
    settle_reduction(job.model, job.task, normalize(first), job.accelerator)
    batches = itertools.chain([first], stream)
    recorder.work_begins()
    under_way: tuple[int, SharedSums] | None = None
    with contextlib.closing(stream):
        for step in steps:
            place.step = step
            if step in job.freezing.thaw_steps and step > steps.start:
                job.thaw(step)
                batches = itertools.chain([first := next(batches)], batches)
                settle_reduction(job.model, job.task, normalize(first), job.accelerator)
            sums, bad = _take_step(job, normalize, batches, flag, step)
            recorder.skipped(step, bad)
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


def _take_step(
    job: Job, normalize: Normalizer, batches: Iterator[Batch], flag: StopFlag, step: int
) -> tuple[SharedSums, list[BadSample]]:
    """One optimizer step: its sums, on their way between the processes, and what was left out of it here."""
    job.set_rates(step)
    share = accumulate(job, normalize, batches, step)
    parameters = list(job.network.parameters())
    clip_gradients(job.accelerator, parameters, job.config.optim, head=job.head_parameters)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    if job.average is not None:
        job.average.update(job.network, step=step)
    rest = [float(flag.signal is not None), float(len(share.bad)), *digest_parts(share.digest)]
    # The loss's sums are the first of what Recorder.step takes apart.
    told = torch.tensor(rest, dtype=torch.float64, device=share.sums.device)
    return SharedSums(torch.cat([share.sums, told])), share.bad


def _evaluates_after(job: Job, step: int) -> bool:
    every = job.config.eval.every_epochs * job.plan.steps_per_epoch
    return (step + 1) % every == 0 or step + 1 == job.last_step


def _pauses_after(job: Job, step: int) -> bool:
    every = (job.config.checkpoint.every_steps, job.weights_every_steps)
    return _evaluates_after(job, step) or any(one and (step + 1) % one == 0 for one in every)


def _evaluation_is_owed(job: Job) -> bool:
    """Whether the run was stopped between a step and the evaluation that belongs behind it."""
    done = job.progress.step
    return done > 0 and _evaluates_after(job, done - 1) and job.progress.evaluated != done


def _pause(job: Job, recorder: Recorder, *, evaluating: bool) -> None:
    """Evaluate if it is time, and save; every process comes here after the same step."""
    recorder.save(best=evaluating and _evaluate(job, recorder))


def _evaluate(job: Job, recorder: Recorder) -> bool:
    """Score what was learned so far; whether it is the best of the run.

    Without a validation split, the mean loss of the steps since the last time here is the score.
    """
    job.progress.evaluated = job.progress.step
    if job.config.data.val_split is None:
        return recorder.epoch()
    network, task, normalize = job.scored, job.task, job.normalizer
    scores = evaluate(
        network, task, job.config, job.dataset, accelerator=job.accelerator, normalize=normalize
    )
    return recorder.evaluation(scores)
