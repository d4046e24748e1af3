"""Finds where a step that is not finite comes from: it is computed once more, and watched.

Its micro-batches are read again, and dropout is seeded by the step: with the same weights, the same happens.
In the order of the computation: pictures, layers, losses of samples, and on the way back losses, layers and
parameters; the first that is not finite is named. Shapes: B samples, S sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from accelerate.utils import gather_object

from data_pipeline.batch import Batch
from training.buffer_copies import BufferCopies
from training.counts import SharedSums
from training.inputs import Inputs
from training.job import Job
from training.micro_batch import seed_dropout, sums_of
from training.nonfinite.layer_watch import NETWORK, BackwardWatch, Culprit, ForwardWatch, rows_not_finite
from training.reading import training_batches

SHOWN = 5  # keys of samples that a message names


class Cause(NamedTuple):
    """What of a step is not finite."""

    what: str  # "the output of conv1"
    layer: str  # dotted name of a module, or what stands for one: input, loss
    samples: tuple[str, ...] = ()  # keys of those it happens in; empty: in none by itself

    @property
    def words(self) -> str:
        """In one sentence."""
        if not self.samples:
            return f"{self.what} is not finite"
        number, shown = len(self.samples), ", ".join(self.samples[:SHOWN])
        more = f", and {number - SHOWN} more" if number > SHOWN else ""
        return f"{self.what} is not finite in {number} sample{'s' * (number > 1)}: {shown}{more}"


class _Found(NamedTuple):
    """What a process has found in a micro-batch; of several, the least `place` counts."""

    place: tuple[int, int]  # stage of the computation, layers before
    cause: Cause


def diagnose(job: Job, step: int) -> Cause:
    """The first cause, over all processes, which all come here; the job stays as it is, without gradients."""
    job.watch.switch("other")
    gradient = {name: one.grad for name, one in job.network.named_parameters() if one.grad is not None}
    broken, weights = names_not_finite(gradient), names_not_finite(dict(job.network.named_parameters()))
    del gradient
    job.optimizer.zero_grad(set_to_none=True)
    if weights:
        return Cause(f"the weight {_listed(weights)}", _module_of(weights[0]))
    kept = BufferCopies(job.network)
    with _as_written(job):
        found, sums = _forward(job, step)
        # Every process goes on to the same stage: layers may talk to one another (train.sync_batchnorm).
        first = _first(gather_object(found))
        if first is None:
            slopes = job.task.objective.slopes(SharedSums(sums).tensor())
            first = _first(gather_object(_backward(job, step, slopes)))
    kept.put_back()
    job.optimizer.zero_grad(set_to_none=True)
    if first is not None:
        return first
    if broken:
        return Cause(f"the gradient of {_listed(broken)}, a sum over samples,", _module_of(broken[0]))
    return Cause("something that is not so when the step is computed again", "unknown")


def names_not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Of the tensors that hold a number that is not finite."""
    return [name for name, tensor in tensors.items() if not bool(tensor.detach().isfinite().all())]


def _forward(job: Job, step: int) -> tuple[list[_Found], torch.Tensor]:
    """What this process finds without a gradient, and its sums of the objective, float64 [S]."""
    found: list[_Found] = []
    total = torch.zeros(job.task.objective.size, dtype=torch.float64, device=job.accelerator.device)
    with torch.no_grad():
        for batch, inputs in _again(job, step):
            watch = ForwardWatch(len(batch.keys))
            with watch.over(job.network):
                sums = sums_of(job, job.network, inputs)
            total += sums
            if not bool(inputs.images.isfinite().all()):
                rows = rows_not_finite(inputs.images, len(batch.keys))
                found += _named(batch, (0, 0), "the normalised picture", "input", rows)
            elif watch.culprit is not None:
                found += _at(batch, 1, "the", watch.culprit)
            elif not bool(sums.isfinite().all()):
                found += _losses(job, batch, inputs, watch.outputs, sums)
    return found, total


def _losses(
    job: Job, batch: Batch, inputs: Inputs, outputs: torch.Tensor, sums: torch.Tensor
) -> list[_Found]:
    """Which loss it is, and of which samples; outputs are finite."""
    objective, spec = job.task.objective, job.config.loss
    pieces = torch.split(sums, [term.size for _, term in objective.terms])
    finite = [bool(piece.isfinite().all()) for piece in pieces]
    name = [*spec.terms, *spec.own][finite.index(False)]
    rows = []
    for row in range(len(batch.keys)):
        # The others are given no weight: a loss of the user's is called with a batch as it knows it.
        alone = torch.zeros_like(inputs.weights)
        alone[row] = inputs.weights[row]
        if not bool(objective.sums(outputs, inputs._replace(weights=alone)).isfinite().all()):
            rows.append(row)
    return _named(batch, (2, 0), f"the loss {name}", f"loss.{name}", rows)


def _backward(job: Job, step: int, slopes: torch.Tensor) -> list[_Found]:
    """What this process finds in gradients, of each micro-batch by itself; all before them is finite."""
    found: list[_Found] = []
    for batch, inputs in _again(job, step):
        watch = BackwardWatch(len(batch.keys))
        with watch.over(job.network):
            sums = sums_of(job, job.network, inputs)
            job.accelerator.backward((sums * slopes.to(sums.dtype)).sum())
        gradients = {name: one.grad for name, one in job.network.named_parameters() if one.grad is not None}
        broken = names_not_finite(gradients)
        culprit = watch.culprit
        if culprit is not None and culprit.layer == NETWORK:
            found += _named(batch, (3, 0), "the gradient of the loss", "loss", culprit.rows)
        elif culprit is not None:
            found += _at(batch, 4, "the gradient of the", culprit)
        elif broken:
            found += _named(batch, (5, 0), f"the gradient of {_listed(broken)}", _module_of(broken[0]), None)
        del gradients
        job.optimizer.zero_grad(set_to_none=True)
    return found


def _again(job: Job, step: int) -> Iterator[tuple[Batch, Inputs]]:
    """This process's micro-batches of the step, each with dropout about to draw as it did."""
    batches = training_batches(
        job.config, job.dataset, job.plan, job.accelerator, steps=range(step, step + 1)
    )
    seed_dropout(job, step, str(job.accelerator.process_index))
    with contextlib.closing(batches):
        for batch in batches:
            job.place.at(samples=batch.keys)
            if job.config.train.exact:
                seed_dropout(job, step, f"grain {batch.work.first // job.config.grain}")
            yield batch, job.normalizer(batch)


def _at(batch: Batch, stage: int, what: str, culprit: Culprit) -> list[_Found]:
    words = f"{what} {culprit.end} of {culprit.layer}"
    return _named(batch, (stage, culprit.before), words, culprit.layer, culprit.rows)


def _named(
    batch: Batch, place: tuple[int, int], what: str, layer: str, rows: list[int] | None
) -> list[_Found]:
    """Nothing where only stand-ins for samples are concerned; `rows` None: nobody knows which samples are."""
    valid = batch.valid.tolist()
    keys = [key for row, key in enumerate(batch.keys) if valid[row] and (rows is None or row in rows)]
    if rows and not keys:
        return []
    return [_Found(place, Cause(what, layer, tuple(keys if rows is None or rows else ())))]


def _first(found: list[_Found]) -> Cause | None:
    """The earliest of what was found, with the samples of all micro-batches in which it is the same."""
    if not found:
        return None
    first = min(found, key=lambda one: one.place)
    same = [
        one.cause.samples for one in found if one.place == first.place and one.cause.what == first.cause.what
    ]
    return first.cause._replace(samples=tuple(key for samples in same for key in samples))


def _as_written(job: Job) -> contextlib.AbstractContextManager[object]:
    """Without compilation: what is compiled looks at no hook that came later."""
    if not job.config.model.compile:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0] or NETWORK
