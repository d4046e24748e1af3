"""Everything that leaves a running job: records, console lines, trackers, checkpoints, plots."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipeline.fault import first_line
from training.bad_samples import BadSamples, most_bad
from training.checkpoints.storage_failures import warn
from training.console import Console
from training.early_stop import after_score
from training.evaluation import Scores, describe
from training.introduction import conclude, introduce, time_lines
from training.job import Job
from training.journal import METRICS_FILE, Journal
from training.nonfinite import check_weights, finite_number, judge, left_out_lines
from training.plots import draw_plots
from training.process import Ended
from training.run_directory import Start
from training.saver import Saver
from training.schedules import after_evaluation
from training.state import Best
from training.step_report import Report, Taken
from training.stopwatch import PARTS, added
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
        self._journal = Journal(run_dir, active=main, committed=job.progress.metrics_bytes, warn=warn)
        self._saver = Saver(job, self._journal)
        self._seconds: dict[str, float] = {}  # of the steps since the last record
        self._loss_missed = False  # whether somebody was told of a held-out loss that is not finite
        self._bad = BadSamples(run_dir, job.accelerator, most=most_bad(config, job.dataset))
        self._journal.write(
            "start",
            step=job.progress.step,
            processes=job.accelerator.num_processes,
            workers=config.data.workers,
            resumed_from=start.checkpoint.name if start.checkpoint else None,
            initialised_from=start.initialised_from,
            device=job.accelerator.device.type,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )
        for note in start.notes:
            self._console.say(note)
        self._tracking(lambda: start_tracking(job.accelerator, config, run_dir, self._console.say))
        introduce(job, self._console.say)
        self._console.begin(step=job.progress.step, steps=job.last_step)

    def work_begins(self) -> None:
        """Training starts or goes on: from here its speed is measured."""
        self._console.work_begins(samples=self._job.progress.step * self._job.config.train.global_batch)

    def step(self, taken: Taken) -> Report:
        """Record an optimizer step; what all processes told of it.

        NONFINITE where it is not finite and the run cannot go on, DATA where too many samples are broken.
        """
        job, config, step, done = self._job, self._job.config, taken.step, taken.step + 1
        job.watch.switch("reduce")
        report = taken.report()
        job.watch.switch("other")
        self._seconds = added(self._seconds, job.watch.read(taken.lap))
        self._bad.met(done, taken.bad)
        if report.bad:
            self._bad.settle(self._console.say)
        loss, by_term = self._losses(report.sums)
        rate = job.rate(step, config.optim.lr)
        epoch, samples = step // job.plan.steps_per_epoch, done * config.train.global_batch
        left_out = self._judged(taken, finite=loss is not None)
        loss = None if left_out == "nonfinite" else loss
        self._saver.between_steps()
        if loss is not None:
            job.progress.losses += loss
            job.progress.counted += 1
        if done % config.log.every_steps == 0 or done == job.last_step or left_out:
            proof = {} if config.debug.batch_digest == "none" else {"batch_digest": report.digest}
            proof |= {"skipped": left_out} if left_out else {}
            told = {"step": done, "epoch": epoch, "samples": samples, "loss": loss, "lr": rate}
            self._journal.write("train", **told, **by_term, **proof, seconds=self._spent())
            shown = {"train/lr": rate, **({} if loss is None else {"train/loss": loss})}
            self._tracking(lambda: track(job.accelerator, done, shown))
        self._console.step(step=done, steps=job.last_step, epoch=epoch, loss=loss, lr=rate, samples=samples)
        return report

    def _spent(self) -> dict[str, float]:
        """The seconds of each part since the last record, evaluations left out; they are told once."""
        spent, self._seconds = self._seconds, {}
        return {part: round(spent[part], 6) for part in PARTS}

    def _losses(self, sums: torch.Tensor) -> tuple[float | None, dict[str, Any]]:
        """The loss of a global batch and, where it is a sum of several, a field with each of them."""
        objective, spec = self._job.task.objective, self._job.config.loss
        names = [*spec.terms, *spec.own]
        found = [float(value) for value in objective.values(sums)]
        loss = sum(factor * value for (factor, _), value in zip(objective.terms, found, strict=True))
        values = dict(zip(names, map(finite_number, found), strict=True))
        return finite_number(loss), {"losses": values} if len(values) > 1 else {}

    def _judged(self, taken: Taken, *, finite: bool) -> str:
        """Say and count what is not finite; why the step was left out, empty where it was not."""
        with self.brought_home():
            found = judge(self._job, taken, finite=finite)
        if found is None:
            return ""
        self._console.say(found.line)
        return found.reason

    def evaluation(self, scores: Scores, *, seconds: float) -> bool:
        """Record the scores after the steps done so far, found in `seconds`; whether they are the best."""
        job, done = self._job, self._job.progress.step
        epoch = (done - 1) // job.plan.steps_per_epoch
        spent = {"evaluation": round(seconds, 6)}
        self._journal.write("eval", step=done, epoch=epoch, **scores.as_json(), seconds=spent)
        known = {name: value for name, value in scores.metrics.items() if value is not None}
        tracked = {f"eval/{name}": value for name, value in known.items()}
        self._tracking(lambda: track(job.accelerator, done, tracked))
        shown = "  ".join(f"{name} {value:.4f}" for name, value in known.items())
        self._console.say(f"epoch {epoch + 1}  validation  {shown}  ({describe(scores.certificate)})")
        if "loss" not in known and not self._loss_missed:
            self._loss_missed = True
            self._console.say("its loss is not finite, so the records have null")
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
        mean = job.progress.losses / job.progress.counted if job.progress.counted else None
        self._journal.write("epoch", step=done, epoch=epoch, metrics={"train_loss": mean})
        shown = "not known: no step of it was finite" if mean is None else f"{mean:.4f} on average"
        self._console.say(f"epoch {epoch + 1}  training loss {shown}")
        return self._compared("train_loss", {"train_loss": mean})

    def _compared(self, name: str, metrics: Mapping[str, float | None]) -> bool:
        """Note the score that chooses, for the schedule and for the best weights; whether it is the best."""
        progress, value, spec = self._job.progress, metrics[name], self._job.config.train.early_stop
        progress.losses, progress.counted = 0.0, 0
        plateau = self._job.config.optim.schedule.plateau
        if plateau is not None:
            progress.plateau = after_evaluation(
                progress.plateau, value, spec=plateau, lower_is_better=name in LOWER_IS_BETTER
            )
        if spec is not None:
            watched = spec.metric or name
            progress.waiting = after_score(
                progress.waiting,
                metrics[watched],
                spec=spec,
                metric=watched,
                lower_is_better=watched in LOWER_IS_BETTER,
            )
        if value is None or (progress.best and not is_better(name, value, progress.best.value)):
            return False
        progress.best = Best(progress.step, name, value)
        return True

    def save(self, *, best: bool) -> None:
        """Begin a checkpoint of everything up to here; returns once the tensors are copied.

        NONFINITE where weights are not finite, STORAGE where too many saves in a row have failed.
        """
        with self.brought_home():
            check_weights(self._job)
        self._saver.save(best=best)

    @contextlib.contextmanager
    def brought_home(self, before: Taken | None = None) -> Iterator[None]:
        """Where the run ends inside, on every process: record the step `before`, then `close`."""
        try:
            yield
        except Ended:
            if before is not None:
                self.step(before)
            self.close()
            raise

    @property
    def lost(self) -> bool:
        """Whether this process knows that no more can be saved: the next `save` will say so to all."""
        return self._saver.lost

    def export(self, checkpoint: Path, *, best: bool) -> None:
        """Copy a committed checkpoint's weights to where a user takes them away."""
        self._saver.export(checkpoint, best=best)

    def close(self, *, asked: float | None = None) -> None:
        """Wait for the last checkpoint, `asked` for then, let the trackers finish, leave the live line."""
        self._job.watch.switch("checkpoint")
        self._saver.close(asked=asked)
        self._job.watch.switch("other")
        self._tracking(lambda: stop_tracking(self._job.accelerator))
        self._console.end()

    def _tracking(self, work: Callable[[], None]) -> None:
        """Do something with the trackers; where they fail, the run goes on without them."""
        try:
            work()
        except Exception as error:  # of kinds of their own
            warn(f"tracking ends here: {first_line(error)}; the records in {METRICS_FILE} go on")
            self._job.accelerator.trackers.clear()

    def account(self) -> None:
        """Say what the time of this start went into, over all processes, which all come here."""
        for line in time_lines(self._job):
            self._console.say(line)

    def conclude(self, ended: str) -> None:
        """Draw the plots and say where everything is, and why there was no more to do, if `ended` says so.

        Every process comes here.
        """
        spent = time_lines(self._job)
        if self._job.accelerator.is_main_process:
            try:
                draw_plots(self._job.request.run_dir)
            except Exception as error:  # a picture of a run is no reason to fail it
                warn(f"the plots are not drawn: {first_line(error)}")
            self._console.say(f"\ncomplete  {ended}" if ended else "")
            for line in spent + left_out_lines(self._job.progress):
                self._console.say(line)
            conclude(self._job, self._console.say)
