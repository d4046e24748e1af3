"""Everything that leaves a running job: records, console lines, trackers, checkpoints, plots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from training.bad_samples import BadSamples, most_bad
from training.console import Console
from training.evaluation import Scores, describe
from training.introduction import conclude, introduce
from training.job import Job
from training.journal import Journal
from training.plots import draw_plots
from training.process import Ended
from training.run_directory import Start
from training.saver import Saver
from training.schedules import after_evaluation
from training.state import Best
from training.step_report import Report, Taken
from training.tasks.task import LOWER_IS_BETTER, is_better
from training.tracking import start_tracking, stop_tracking, track


class Recorder:
    """Writes for process zero; on the others every method runs and writes nothing."""

    def __init__(self, job: Job, start: Start) -> None:
        self._job = job
        config, run_dir, main = job.config, job.request.run_dir, job.accelerator.is_main_process
        self._console = Console(
            active=main and not job.request.flags.quiet, every_seconds=config.log.every_seconds
        )
        self._journal = Journal(run_dir, active=main, committed=job.progress.metrics_bytes)
        self._saver = Saver(job, self._journal)
        self._bad = BadSamples(run_dir, job.accelerator, most=most_bad(config, job.dataset))
        self._journal.write(
            "start",
            step=job.progress.step,
            processes=job.accelerator.num_processes,
            workers=config.data.workers,
            resumed_from=start.checkpoint.name if start.checkpoint else None,
            device=job.accelerator.device.type,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )
        for note in start.notes:
            self._console.say(note)
        start_tracking(job.accelerator, config, run_dir, self._console.say)
        introduce(job, self._console.say)
        self._console.begin(step=job.progress.step, steps=job.last_step)

    def work_begins(self) -> None:
        """Training starts or goes on: from here its speed is measured."""
        self._console.work_begins(samples=self._job.progress.step * self._job.config.train.global_batch)

    def step(self, taken: Taken) -> Report:
        """Record an optimizer step; what all processes told of it.

        NONFINITE where the loss is not a number, DATA where too many samples are broken.
        """
        job, config, step, done = self._job, self._job.config, taken.step, taken.step + 1
        report = taken.report()
        self._bad.met(done, taken.bad)
        if report.bad:
            self._bad.settle(self._console.say)
        loss, by_term = self._losses(report.sums)
        rate = job.rate(step, config.optim.lr)
        epoch, samples = step // job.plan.steps_per_epoch, done * config.train.global_batch
        if not math.isfinite(loss):
            self._console.end()
            raise Ended(
                "NONFINITE",
                f"error: the loss of step {done} is {loss}",
                hint="lower --optim.lr, warm up longer, or set --optim.clip-norm 1; then start with --fresh",
            )
        job.progress.losses += loss
        job.progress.counted += 1
        if done % config.log.every_steps == 0 or done == job.last_step:
            proof = {} if config.debug.batch_digest == "none" else {"batch_digest": report.digest}
            told = {"step": done, "epoch": epoch, "samples": samples, "loss": loss, "lr": rate}
            seconds = {part: round(spent, 6) for part, spent in taken.seconds.items()}
            self._journal.write("train", **told, **by_term, **proof, seconds=seconds)
            track(job.accelerator, done, {"train/loss": loss, "train/lr": rate})
        self._console.step(step=done, steps=job.last_step, epoch=epoch, loss=loss, lr=rate, samples=samples)
        return report

    def _losses(self, sums: torch.Tensor) -> tuple[float, dict[str, Any]]:
        """The loss of a global batch and, where it is a sum of several, a field with each of them."""
        objective, spec = self._job.task.objective, self._job.config.loss
        names = [*spec.terms, *spec.own]
        values = dict(zip(names, map(float, objective.values(sums)), strict=True))
        return float(objective.value(sums)), {"losses": values} if len(values) > 1 else {}

    def evaluation(self, scores: Scores) -> bool:
        """Record the scores after the steps done so far; whether they are the best of the run."""
        job, done = self._job, self._job.progress.step
        epoch = (done - 1) // job.plan.steps_per_epoch
        self._journal.write("eval", step=done, epoch=epoch, **scores.as_json())
        known = {name: value for name, value in scores.metrics.items() if value is not None}
        track(job.accelerator, done, {f"eval/{name}": value for name, value in known.items()})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in known.items())
        self._console.say(f"epoch {epoch + 1}  validation  {shown}  ({describe(scores.certificate)})")
        thresholds = scores.findings.thresholds
        if thresholds is not None:
            job.progress.thresholds["last"] = thresholds
        best = self._compared(job.config.eval.best or job.task.primary, scores.metrics)
        if best and thresholds is not None:
            job.progress.thresholds["best"] = thresholds
        return best

    def epoch(self) -> bool:
        """Without a validation split: record the mean loss of the steps since the last time; whether best."""
        job, done = self._job, self._job.progress.step
        epoch = (done - 1) // job.plan.steps_per_epoch
        metrics = {"train_loss": job.progress.losses / max(1, job.progress.counted)}
        self._journal.write("epoch", step=done, epoch=epoch, metrics=metrics)
        self._console.say(f"epoch {epoch + 1}  training loss {metrics['train_loss']:.4f} on average")
        return self._compared("train_loss", metrics)

    def _compared(self, name: str, metrics: Mapping[str, float | None]) -> bool:
        """Note the score that chooses, for the schedule and for the best weights; whether it is the best."""
        progress, value = self._job.progress, metrics[name]
        progress.losses, progress.counted = 0.0, 0
        plateau = self._job.config.optim.schedule.plateau
        if plateau is not None:
            progress.plateau = after_evaluation(
                progress.plateau, value, spec=plateau, lower_is_better=name in LOWER_IS_BETTER
            )
        if value is None or (progress.best and not is_better(name, value, progress.best.value)):
            return False
        progress.best = Best(progress.step, name, value)
        return True

    def save(self, *, best: bool) -> None:
        """Begin a checkpoint of everything up to here; returns once the tensors are copied."""
        self._saver.save(best=best)

    def export(self, checkpoint: Path, *, best: bool) -> None:
        """Copy a committed checkpoint's weights to where a user takes them away."""
        self._saver.export(checkpoint, best=best)

    def close(self) -> None:
        """Wait for the last checkpoint, let the trackers finish, and leave the live line."""
        self._saver.close()
        stop_tracking(self._job.accelerator)
        self._console.end()

    def conclude(self) -> None:
        """Draw the plots and say where everything is."""
        if self._job.accelerator.is_main_process:
            draw_plots(self._job.request.run_dir)
            self._console.say("")
            conclude(self._job, self._console.say)
