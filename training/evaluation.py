"""Scores a split exactly once on any number of processes, with proof; no collective runs inside the pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from numpy.typing import NDArray

from data_pipeline.batch import Batch
from data_pipeline.draws import hash64
from data_pipeline.index import DatasetIndex
from data_pipeline.plan import Work, evaluation_work
from training.config import Config
from training.counts import (
    Certificate,
    Runs,
    SharedSums,
    add_to_runs,
    digest_parts,
    distinct,
    gather_rows,
    gather_runs,
    joined_digest,
)
from training.inputs import Inputs, Normalizer
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
    runs: Runs
    outputs: list[NDArray[Any]]
    targets: list[NDArray[Any]]


def evaluate(
    network: torch.nn.Module,
    task: Task,
    config: Config,
    dataset: DatasetIndex,
    *,
    accelerator: Accelerator,
    normalize: Normalizer,
) -> Scores:
    """Score `network` (bare, not wrapped for DDP) on the validation split; the same numbers on every process.

    All processes take process zero's weights and buffers first: running statistics of BatchNorm drift apart.
    RuntimeError where the certificate does not hold.
    """
    assert config.data.val_split is not None
    take_from_main(network, accelerator)
    split = dataset.split(config.data.val_split)
    found = _pass(network, task, config, dataset, accelerator=accelerator, normalize=normalize)
    totals = _reduced(found.sums, accelerator.device)
    parts = totals.pop("_digest").tolist()
    certificate = Certificate(
        split.samples, int(totals.pop("_seen")), distinct(gather_runs(found.runs)), joined_digest(parts)
    )
    certificate.check(split.keys_digest)
    loss = float(task.objective.value(torch.from_numpy(totals.pop("_loss"))))
    kept = _gathered(found, task.outputs) if task.keeps_rows else None
    findings = task.score(totals, kept)
    return Scores(replace(findings, metrics={**findings.metrics, "loss": loss}), certificate, kept)


def take_from_main(network: torch.nn.Module, accelerator: Accelerator) -> None:
    """Overwrite weights and buffers with those of process zero."""
    if accelerator.num_processes > 1:
        for tensor in network.state_dict().values():
            tensor.copy_(broadcast(tensor, from_process=0))


def _pass(
    network: torch.nn.Module,
    task: Task,
    config: Config,
    dataset: DatasetIndex,
    *,
    accelerator: Accelerator,
    normalize: Normalizer,
) -> _Found:
    """This process's sums over its batches, and the numbers of the samples that were in them."""
    assert config.data.val_split is not None
    samples = dataset.split(config.data.val_split).samples

    def work() -> Iterator[Work]:
        return evaluation_work(
            samples,
            batch=config.eval.batch,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )

    # Also a process without a batch names every sum: the reduction needs the same vector everywhere.
    shapes = {**task.sums, "_loss": (task.objective.size,)}
    zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    found = _Found({**zeros, **_proof_sums([])}, [], [], [])
    found.sums = {name: value.to(accelerator.device) for name, value in found.sums.items()}
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    with torch.inference_mode():
        for batch in batches(config, dataset, accelerator, work, learning=False):
            inputs = normalize(batch)
            with accelerator.autocast():
                outputs = network(inputs.images)
            _add(found, task, outputs.float(), inputs, batch)
    for module, training in modes:
        module.training = training
    return found


def _add(found: _Found, task: Task, outputs: torch.Tensor, inputs: Inputs, batch: Batch) -> None:
    sums = task.tally(outputs, inputs.targets, inputs.valid)
    sums |= {"_loss": task.objective.sums(outputs, inputs), **_proof_sums([batch])}
    for name, value in sums.items():
        found.sums[name] = found.sums[name] + value.to(found.sums[name].device)
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
