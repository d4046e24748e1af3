"""Looks at a network before its first step in exact mode: what it uses, and what it keeps.

Two passes that count for nothing show this of any network, where a list of known layers would not.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch.nn.modules.batchnorm import _NormBase

from data_pipeline.batch import Batch
from data_pipeline.fault import UserError
from training.exact.flat_gradients import FlatGradients
from training.exact.grain_sums import GrainSums
from training.exact.running_statistics import (
    RunningStatistics,
    learning_norms,
    own_statistics,
    statistics_of,
)
from training.inputs import forward
from training.job import Job
from training.micro_batch import seed_dropout

NEVER = -1.0  # no variance is negative
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class _Seen(NamedTuple):
    """What a pass has shown."""

    calls: dict[_NormBase, int]  # layers that have written statistics, and how many passes they counted
    changed: list[str]  # buffers that are no layer's statistics, and are not what they were
    used: dict[str, torch.nn.Parameter]  # what has a gradient
    unused: dict[str, torch.nn.Parameter]


def settled(job: Job, batch: Batch) -> GrainSums:
    """Buffers for the network as it learns from now on; every process comes here, with a grain of its own.

    Weights, gradients and running statistics stay as they were. CONFIG where a pass changes what could not be
    the same on every number of processes, where an operation adds up in no fixed order, and where processes
    differ.
    """
    job.watch.switch("other")
    seen = _seen(job, batch)
    _check_buffers(seen.changed)
    _check_types(seen.used)
    everything = [*job.network.named_parameters(), *job.network.named_buffers()]
    _check_same_everywhere(_marks(everything), list(seen.used))
    grains, processes = job.config.grains, job.accelerator.num_processes
    return GrainSums(
        FlatGradients(seen.used, grains=grains // processes, processes=processes),
        RunningStatistics(seen.calls, grains=grains, processes=processes) if seen.calls else None,
        seen.unused,
    )


def _seen(job: Job, batch: Batch) -> _Seen:
    network = job.network
    norms = learning_norms(network)
    with _statistics_kept(norms.values()):
        # Twice: what a network makes once and keeps, such as a table of positions, is no state.
        _pass(job, batch)
        before = _marks(network.named_buffers())
        counted = {norm: _count(norm) for norm in norms.values()}
        for norm in norms.values():
            assert norm.running_var is not None
            norm.running_var.fill_(NEVER)
        with own_statistics(norms.values()):
            _pass(job, batch)
        calls = {norm: _count(norm) - counted[norm] for norm in norms.values() if _has_run(norm)}
        after = _marks(network.named_buffers())
    statistics = {f"{name}.{kind}" for name in norms for kind in STATISTICS}
    changed = [name for name in after if name not in statistics and after[name] != before.get(name)]
    used: dict[str, torch.nn.Parameter] = {}
    unused: dict[str, torch.nn.Parameter] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            (unused if parameter.grad is None else used)[name] = parameter
            parameter.grad = None
    return _Seen(calls, changed, used, unused)


def _pass(job: Job, batch: Batch) -> None:
    """Forward and backward, and what an evaluation does with outputs; CONFIG where that cannot be exact."""
    seed_dropout(job, batch.work.step, "settling")
    inputs = job.normalizer(batch)
    try:
        with job.accelerator.autocast():
            outputs = forward(job.model, inputs.images)
        job.accelerator.backward(job.task.objective.sums(outputs, inputs).sum() * 0.0)
        job.task.tally(outputs.detach().float(), inputs.targets, inputs.valid)
    except UserError as error:
        # BatchNorm that is left alone with one value: here the grain is what it sees.
        mend = f"raise --train.grain, the samples that BatchNorm sees ({job.config.grain} now)"
        raise UserError(error.what, mend=mend, code=error.code) from None
    except RuntimeError as error:
        text = str(error)
        if "deterministic" not in text:
            raise
        operation = text.partition(" does not have a deterministic")[0].splitlines()[0]
        raise UserError(
            f"train.exact: the network or its loss uses an operation that adds up in no fixed order on "
            f"{job.accelerator.device.type}: {operation}",
            mend="choose another network or loss, or set --train.exact false",
            code="CONFIG",
        ) from None


@contextlib.contextmanager
def _statistics_kept(norms: Collection[_NormBase]) -> Iterator[None]:
    """Whatever happens inside to running statistics and their counters, it is undone."""
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    kept = [*statistics_of(norms), *counters]
    before = [one.clone() for one in kept]
    try:
        yield
    finally:
        for one, old in zip(kept, before, strict=True):
            one.copy_(old)


def _has_run(norm: _NormBase) -> bool:
    return norm.running_var is not None and not bool((norm.running_var == NEVER).all())


def _count(norm: _NormBase) -> int:
    return 0 if norm.num_batches_tracked is None else int(norm.num_batches_tracked)


def _check_buffers(changed: list[str]) -> None:
    if changed:
        raise UserError(
            f"train.exact: a forward pass in training changes the network's {_some(changed)}, which would "
            "depend on which process computes which grain",
            mend="choose a network without it (BatchNorm is fine), or set --train.exact false",
            code="CONFIG",
        )


def _check_types(parameters: dict[str, torch.nn.Parameter]) -> None:
    others = [name for name, one in parameters.items() if one.dtype != torch.float32]
    if others:
        raise UserError(
            f"train.exact: adds up gradients in float32, the network's {_some(others)} is of another type",
            mend="choose a network whose weights are float32, or set --train.exact false",
            code="CONFIG",
        )


def _check_same_everywhere(marks: dict[str, str], used: list[str]) -> None:
    """CONFIG where weights, buffers or what of them is used differ between processes; all come here.

    Nothing else would notice: no process ever gets another one's weights.
    """
    (zero, zero_used), *others = gather_object([(marks, used)])
    differing = []
    for rank, (theirs, their_used) in enumerate(others, 1):
        names = [name for name in zero if theirs.get(name) != zero[name]] or sorted(
            {*zero_used} ^ {*their_used}
        )
        if names:
            differing.append(f"process {rank} differs from process 0: {_some(names)} of the network")
    if differing:
        raise UserError(
            "\n".join(differing),
            mend="train.exact needs equal machines and equal versions of all packages for every process",
            code="CONFIG",
        )


def _marks(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """A digest of each tensor's bits."""
    found = {}
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1).cpu().view(torch.uint8).numpy()
        found[name] = f"{list(tensor.shape)} {hashlib.blake2b(flat.tobytes(), digest_size=8).hexdigest()}"
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
