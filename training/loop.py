"""Trains: one optimizer step is one global batch, and everything else happens between steps."""

from __future__ import annotations

import contextlib
import itertools

from training.cadence import SaveClock, evaluates_after, evaluation_is_owed, saves_after
from training.evaluation import evaluate
from training.job import Job
from training.process import Ended, StopFlag
from training.reading import training_batches
from training.recorder import Recorder
from training.reduction import settle_reduction
from training.run_directory import Start
from training.step import take_step
from training.step_report import Taken


def train(job: Job, start: Start) -> None:
    """Run from where the job stands to its last step; STOPPED, NONFINITE and STORAGE end it before."""
    recorder, flag = Recorder(job, start), StopFlag()
    if start.checkpoint is not None and evaluation_is_owed(job):
        recorder.export(start.checkpoint, best=_evaluate(job, recorder))
    steps = range(job.progress.step, job.last_step)
    if steps:
        _train_steps(job, recorder, flag, steps)
    recorder.close()
    recorder.conclude()


def _train_steps(job: Job, recorder: Recorder, flag: StopFlag, steps: range) -> None:
    stream = training_batches(job.config, job.dataset, job.plan, job.accelerator, steps=steps)
    first = next(stream)
    job.learn()
    settle_reduction(job, first)
    batches = itertools.chain([first], stream)
    clock = SaveClock(job.config.checkpoint.every_minutes)
    recorder.work_begins()
    before: Taken | None = None
    with contextlib.closing(stream):
        for step in steps:
            if step in job.freezing.thaw_steps and step > steps.start:
                job.thaw(step)
                batches = itertools.chain([first := next(batches)], batches)
                settle_reduction(job, first)
            taken = take_step(job, batches, step, stop=flag.asked, save=clock.due)
            # A step's sums travel while the next one computes: they are read one step late, or at a pause.
            told = [] if before is None else [recorder.step(before)]
            before = taken
            stop, save = any(one.stop for one in told), any(one.save for one in told)
            if stop or save or saves_after(job, step):
                stop = recorder.step(taken).stop or stop
                before = None
                job.progress.step = step + 1
                _pause(job, recorder, evaluating=evaluates_after(job, step) and not stop)
                clock.saved()
                recorder.work_begins()
            if stop:
                recorder.close()
                what = f"stopped on request after step {step + 1}"
                raise Ended("STOPPED", what, hint="start the same command again to go on")


def _pause(job: Job, recorder: Recorder, *, evaluating: bool) -> None:
    """Evaluate if it is time, and save; every process comes here after the same step."""
    best = evaluating and _evaluate(job, recorder)
    job.watch.switch("checkpoint")
    recorder.save(best=best)
    job.watch.switch("other")


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
