"""Trains: one optimizer step is one global batch, and everything else happens between steps."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Generator
from typing import NoReturn

from data_pipeline.batch import Batch
from training.cadence import SaveClock, evaluation_is_owed, job_cadence
from training.early_stop import why_over
from training.evaluation import Examined, evaluate
from training.job import Job
from training.process import Ended
from training.reading import training_batches
from training.recorder import Recorder
from training.reduction import settle_reduction
from training.run_directory import Start
from training.step import take_step
from training.step_report import Taken
from training.stop_flag import StopFlag


def train(job: Job, start: Start) -> None:
    """Run from where the job stands to its last step; STOPPED, NONFINITE and STORAGE end it before."""
    job.watch.follow(job.accelerator.device)
    recorder = Recorder(job, start)
    flag = StopFlag(job.config.train.max_minutes, since=job.place.began)
    if start.checkpoint is not None and evaluation_is_owed(job):
        best = _evaluate(job, recorder, flag)
        if best is None:
            _stop(job, recorder, flag)
        recorder.export(start.checkpoint, best=best)
    steps = range(0) if _is_over(job) else range(job.progress.step, job.last_step)
    if steps:
        stream = training_batches(job.config, job.dataset, job.plan, job.accelerator, steps=steps)
        _train_steps(job, recorder, flag, steps, stream)
    job.place.rest()
    recorder.close()
    recorder.conclude(_is_over(job) or ("" if steps else f"all {job.progress.step} steps were done before"))


def _train_steps(
    job: Job, recorder: Recorder, flag: StopFlag, steps: range, stream: Generator[Batch, None, None]
) -> None:
    job.place.at()
    first = next(stream)
    job.learn()
    settle_reduction(job, first)
    batches = itertools.chain([first], stream)
    clock, cadence = SaveClock(job.config.checkpoint.every_minutes), job_cadence(job)
    recorder.work_begins()
    job.watch.started()
    before: Taken | None = None
    with contextlib.closing(stream):
        for step in steps:
            if step in job.freezing.thaw_steps and step > steps.start:
                job.thaw(step)
                batches = itertools.chain([first := next(batches)], batches)
                settle_reduction(job, first)
            with recorder.brought_home(before):
                taken = take_step(job, batches, step, stop=flag.asked, save=clock.due or recorder.lost)
            # A step's sums travel while the next one computes: they are read one step late, or at a pause.
            told = [] if before is None else [recorder.step(before)]
            before = taken
            stop, save = any(one.stop for one in told), any(one.save for one in told)
            if stop or save or cadence.saves_after(step):
                stop = recorder.step(taken).stop or stop
                before = None
                job.progress.step = step + 1
                evaluating = cadence.evaluates_after(step) and not stop
                stop = not _pause(job, recorder, flag, evaluating=evaluating) or stop
                clock.saved()
                recorder.work_begins()
            if stop:
                _stop(job, recorder, flag)
            if _is_over(job):
                return


def _pause(job: Job, recorder: Recorder, flag: StopFlag, *, evaluating: bool) -> bool:
    """Evaluate if it is time, and save; every process comes here after the same step.

    False where the evaluation was broken off: the checkpoint then says that it is owed.
    """
    best = _evaluate(job, recorder, flag) if evaluating else False
    job.watch.switch("checkpoint")
    recorder.save(best=bool(best))
    job.place.at()
    job.watch.switch("other")
    return best is not None


def _stop(job: Job, recorder: Recorder, flag: StopFlag) -> NoReturn:
    """End the run here, where a checkpoint has been made; every process comes here."""
    why = flag.agreed_reason()
    job.place.rest()
    recorder.close(asked=flag.heard_at)
    recorder.account()
    owed = ", before the evaluation that belongs behind it" if evaluation_is_owed(job) else ""
    what = f"stopped {why}, after step {job.progress.step}{owed}"
    raise Ended("STOPPED", what, hint="start the same command again to go on")


def _is_over(job: Job) -> str:
    """Why the run ends before its last step, if its evaluations say so."""
    return why_over(job.progress.waiting, job.config.train.early_stop)


def _evaluate(job: Job, recorder: Recorder, flag: StopFlag) -> bool | None:
    """Score what was learned so far; whether it is the best of the run, None where it was broken off.

    Without a validation split, the mean loss of the steps since the last time here is the score.
    """
    began, done = time.monotonic(), job.progress.step
    if job.config.data.val_split is None:
        job.progress.evaluated = done
        return recorder.epoch()
    job.watch.switch("evaluation")
    examined = Examined(job.scored, job.task, job.config, job.dataset, job.accelerator, job.normalizer)
    scores = evaluate(examined, place=job.place, asked=lambda: flag.asked)
    job.watch.switch("other")
    if scores is None:
        return None
    job.progress.evaluated = done
    return recorder.evaluation(scores, seconds=time.monotonic() - began)
