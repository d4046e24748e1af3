"""What becomes of a step that is not finite: the run ends, or goes on as if the step had not been.

All processes have the same gradient, so each looks at it alone, and all decide alike before the optimizer's
step. With half precision (fp16) an infinite gradient is first of all the scaler's: it lowers its scale.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

from training.buffer_copies import BufferCopies
from training.job import Job
from training.nonfinite.diagnosis import Cause, diagnose, names_not_finite
from training.process import Ended, agree
from training.state import Progress
from training.step_report import Taken

IN_A_ROW = 10  # steps that are not finite, one after the other, end the run also where they are left out
LOWEST_SCALE = 1.0  # below, a scaler makes gradients smaller: what overflows now does so by itself

LOWER = "lower --optim.lr, warm up longer, or set --optim.clip-norm 1, and start anew: --fresh"
LEAVE_OUT = f"start again with --train.on-nonfinite skip to leave such steps out; or {LOWER}"
BFLOAT = f"use --train.precision bf16; or {LOWER}"


class LeftOut(NamedTuple):
    """What there is to say of a step that was not like the others."""

    reason: Literal["nonfinite", "scale", ""]  # why it changed no weights; empty: it did
    line: str  # for people


def statistics_before(job: Job) -> BufferCopies | None:
    """What a step that may be left out has to give back; before its first forward pass."""
    may_be = job.config.train.on_nonfinite == "skip" or job.accelerator.scaler is not None
    return BufferCopies(job.network) if may_be else None


def leave_out(job: Job, step: int, before: BufferCopies | None) -> str:
    """Undo what a step whose gradient is not finite has changed, and say why; every process comes here.

    NONFINITE where the run cannot go on: then nothing but running statistics has changed.
    """
    if before is not None:
        before.put_back()
    if job.accelerator.scaler is not None:
        return _lower_scale(job, step, job.accelerator.scaler)
    cause = diagnose(job, step)
    if job.config.train.on_nonfinite == "stop":
        raise _ended(job, step, cause.words, hint=LEAVE_OUT, cause=cause)
    return cause.words


def _lower_scale(job: Job, step: int, scaler: torch.amp.GradScaler) -> str:
    """What the scaler does after a step that it forbids; a rule that is fused would not tell of it."""
    scale = scaler.get_scale()
    scaler.update()
    if scaler.get_scale() < LOWEST_SCALE:
        cause = diagnose(job, step)
        what = f"at fp16's lowest scale of {scale:g}, {cause.words}"
        raise _ended(job, step, what, hint=BFLOAT, cause=cause)
    return f"its gradient overflows fp16 at a scale of {scale:g}, from here on {scaler.get_scale():g}"


def judge(job: Job, taken: Taken, *, finite: bool) -> LeftOut | None:
    """Count a step that was left out, or whose loss is not `finite`; None for all others.

    The loss is known when the sums of all processes have come, one step late. NONFINITE where the run cannot
    go on. Every process comes here.
    """
    progress, step, scaled = job.progress, taken.step, job.accelerator.scaler is not None
    if finite and not taken.skipped:
        progress.nonfinite_row = 0
        return None
    if finite and scaled:
        progress.rescaled += 1
        return LeftOut("scale", f"step {step + 1} is left out: {taken.skipped}")
    words = taken.skipped
    if not taken.skipped or scaled:  # no scale makes a loss finite
        cause = diagnose(job, step)
        words = cause.words
        if job.config.train.on_nonfinite == "stop":
            raise _ended(job, step, words, hint=LEAVE_OUT, cause=cause)
    progress.nonfinite_row += 1
    if progress.nonfinite_row == IN_A_ROW:
        what = f"{IN_A_ROW} steps in a row were not finite; in this one {words}"
        raise _ended(job, step, what, hint=LOWER)
    if not taken.skipped:
        return LeftOut("", f"the loss of step {step + 1} is not finite, though its gradient was: {words}")
    progress.skipped += 1
    return LeftOut("nonfinite", f"step {step + 1} is left out: {words}")


def left_out_lines(progress: Progress) -> list[str]:
    """What a run says at its end of the steps that it left out."""
    counts = {"not finite": progress.skipped, "fp16 needed another scale": progress.rescaled}
    return [f"left out  {number} step{'s' * (number > 1)}: {why}" for why, number in counts.items() if number]


def check_weights(job: Job) -> None:
    """NONFINITE where what is about to be saved is not finite; every process comes here.

    A step too far does that, though its gradient is finite. Process zero decides: its statistics are saved.
    """

    def broken() -> list[str]:
        tensors = {name: one.detach() for name, one in job.network.named_parameters()}
        for name, module in job.network.named_modules():
            for kind in ("running_mean", "running_var"):
                if isinstance(buffer := getattr(module, kind, None), torch.Tensor):
                    tensors[f"{name}.{kind}"] = buffer
        # One number of all; where that is finite, so is each.
        norm = torch.nn.utils.get_total_norm(list(tensors.values()))
        return [] if bool(norm.isfinite()) else names_not_finite(tensors)

    if names := agree(job.accelerator, broken):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        what = f"what was learned is not finite any more, and is not saved: {names[0]}{more}"
        cause = Cause(what, names[0].rpartition(".")[0])
        raise _ended(job, job.progress.step - 1, what, hint=LOWER, cause=cause)


def finite_number(value: float) -> float | None:
    """A number for a record; None where it is not finite, for which JSON has no word."""
    return value if math.isfinite(value) else None


def _ended(job: Job, step: int, what: str, *, hint: str, cause: Cause | None = None) -> Ended:
    job.place.at(step=step)
    samples, layer = (cause.samples, cause.layer) if cause else ((), "")
    return Ended("NONFINITE", f"error: step {step + 1}: {what}", hint=hint, samples=samples, layer=layer)
