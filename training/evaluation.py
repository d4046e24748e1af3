"""Scores a split exactly once on any number of processes, with proof; no collective runs inside the pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from numpy.typing import NDArray

from data_pipeline.batch import Batch
from data_pipeline.draws import hash64
from data_pipeline.index import DatasetIndex, Split
from data_pipeline.plan import Work, evaluation_work
from training.config import Config
from training.counts import (
    Certificate,
    Runs,
    SharedSums,
    add_to_runs,
    digest_parts,
    distinct,
    exact_sums,
    gather_rows,
    gather_runs,
    joined_digest,
)
from training.inputs import Inputs, Normalizer
from training.process import Place
from training.reading import batches
from training.tasks.task import Findings, Kept, Tally, Task


@dataclass(frozen=True)
class Scores:
    """What an evaluation found, and the proof that it saw the whole split."""

    findings: Findings
    certificate: Certificate
    kept: Kept | None = None  # what the scores were made from, where no sums are enough

    @property
    def metrics(self) -> dict[str, float | None]:
        """Scores of the whole split by name; None where one is not defined."""
        return self.findings.metrics

    def as_json(self) -> dict[str, Any]:
        """The fields that a record of an evaluation carries."""
        by_class = {"classes": self.findings.classes} if self.findings.classes else {}
        return {"metrics": self.metrics, **by_class, "certificate": asdict(self.certificate)}


@dataclass
class _Found:
    """What one process has of a pass."""

    sums: Tally
    runs: Runs = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)  # float64 [S] of the objective, of each batch
    outputs: list[NDArray[Any]] = field(default_factory=list)
    targets: list[NDArray[Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Examined:
    """What is evaluated: a network (bare, not wrapped for DDP) on `data.val_split` of a data set, and how."""

    network: torch.nn.Module
    task: Task
    config: Config
    dataset: DatasetIndex
    accelerator: Accelerator
    normalize: Normalizer

    @property
    def split(self) -> Split:
        """The samples."""
        assert self.config.data.val_split is not None
        return self.dataset.split(self.config.data.val_split)


def evaluate(
    examined: Examined, *, place: Place | None = None, asked: Callable[[], bool] = lambda: False
) -> Scores | None:
    """Score the network on the validation split; the same numbers on every process.

    All processes take process zero's weights and buffers first: running statistics of BatchNorm drift apart.
    None on all of them where one was `asked` to stop before the end of its share: a part of a split has no
    score. RuntimeError where the certificate does not hold.
    """
    task, accelerator = examined.task, examined.accelerator
    take_from_main(examined.network, accelerator)
    found = _pass(examined, place or Place(), asked)
    totals = _reduced(found.sums, accelerator.device)
    if totals.pop("_broken_off"):
        return None
    split, parts = examined.split, totals.pop("_digest").tolist()
    certificate = Certificate(
        split.samples, int(totals.pop("_seen")), distinct(gather_runs(found.runs)), joined_digest(parts)
    )
    certificate.check(split.keys_digest)
    rows = [torch.stack(found.losses).cpu().numpy()] if found.losses else []
    sums = exact_sums(gather_rows(rows, width=task.objective.size, kind=np.float64))
    kept = _gathered(found, task.outputs) if task.keeps_rows else None
    findings = task.score(totals, kept)
    loss = float(task.objective.value(sums))
    metrics = {**findings.metrics, "loss": loss if math.isfinite(loss) else None}
    return Scores(replace(findings, metrics=metrics), certificate, kept)


def take_from_main(network: torch.nn.Module, accelerator: Accelerator) -> None:
    """Overwrite weights and buffers with those of process zero."""
    if accelerator.num_processes > 1:
        for tensor in network.state_dict().values():
            tensor.copy_(broadcast(tensor, from_process=0))


def _pass(examined: Examined, place: Place, asked: Callable[[], bool]) -> _Found:
    """This process's sums over its batches, and the numbers of the samples that were in them."""
    network, task, accelerator = examined.network, examined.task, examined.accelerator

    def work() -> Iterator[Work]:
        return evaluation_work(
            examined.split.samples,
            batch=examined.config.eval.batch,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )

    # Also a process without a batch names every sum: the reduction needs the same vector everywhere.
    zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in task.sums.items()}
    found = _Found({**zeros, **_proof_sums([]), "_broken_off": torch.zeros((), dtype=torch.float64)})
    found.sums = {name: value.to(accelerator.device) for name, value in found.sums.items()}
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    read = batches(examined.config, examined.dataset, accelerator, work, learning=False)
    with torch.inference_mode(), contextlib.closing(read):
        for batch in read:
            if asked():
                found.sums["_broken_off"] += 1
                break
            place.at(samples=batch.keys)
            inputs = examined.normalize(batch)
            with accelerator.autocast():
                outputs = network(inputs.images)
            _add(found, task, outputs.float(), inputs, batch)
    for module, training in modes:
        module.training = training
    return found


def _add(found: _Found, task: Task, outputs: torch.Tensor, inputs: Inputs, batch: Batch) -> None:
    sums = task.tally(outputs, inputs.targets, inputs.valid)
    sums |= _proof_sums([batch])
    for name, value in sums.items():
        found.sums[name] = found.sums[name] + value.to(found.sums[name].device)
    found.losses.append(task.objective.sums(outputs, inputs).double())
    add_to_runs(found.runs, batch.work.numbers)
    if task.keeps_rows:
        found.outputs.append(outputs.cpu().numpy())
        found.targets.append(inputs.targets.cpu().numpy().copy())


def _proof_sums(batches: list[Batch]) -> Tally:
    """Samples delivered and the digest of their keys, as sums beside the task's own."""
    keys = [key for batch in batches for key in batch.keys]
    digest = digest_parts(sum(hash64(key.encode()) for key in keys) % 2**64)
    named = {"_digest": digest, "_seen": float(len(keys))}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in named.items()}


def _reduced(sums: Tally, device: torch.device) -> dict[str, NDArray[Any]]:
    """The sums of all processes: one vector, one reduction."""
    names = sorted(sums)
    vector = torch.cat([sums[name].double().reshape(-1) for name in names])
    joined = SharedSums(vector.to(device)).tensor().cpu().numpy()
    ends = np.cumsum([sums[name].numel() for name in names])[:-1]
    pieces = zip(names, np.split(joined, ends), strict=True)
    return {name: piece.reshape(sums[name].shape) for name, piece in pieces}


def _gathered(found: _Found, width: int) -> Kept:
    """The kept rows of all processes; each has a consecutive part of the split, so they come in its order."""
    outputs = gather_rows(found.outputs, width=width, kind=np.float32)
    return Kept(outputs, gather_rows(found.targets, width=width, kind=np.int8))


def describe(certificate: Certificate) -> str:
    """The certificate in words."""
    return f"{certificate.seen} of {certificate.expected} samples, each once"
