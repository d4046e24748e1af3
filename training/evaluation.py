"""Scores a split exactly once on any number of processes, with proof; no collective runs inside the pass."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from data_pipeline.batch import Batch
from data_pipeline.draws import hash64
from data_pipeline.index import DatasetIndex
from data_pipeline.plan import Work, evaluation_work
from training.command import Request
from training.config import Config
from training.console import Console
from training.counts import (
    DIGEST_PARTS,
    Certificate,
    Runs,
    SharedSums,
    add_to_runs,
    digest_parts,
    distinct,
    gather_runs,
    joined_digest,
)
from training.inputs import Normalizer
from training.reading import batches
from training.tasks.task import Tally, Task
from training.weights import read_weights


@dataclass(frozen=True)
class Scores:
    """What an evaluation found, and the proof that it saw the whole split."""

    metrics: dict[str, float]
    certificate: Certificate

    def as_json(self) -> dict[str, Any]:
        """The fields that a record of an evaluation carries."""
        return {"metrics": self.metrics, "certificate": asdict(self.certificate)}


def evaluate(
    network: torch.nn.Module, task: Task, config: Config, dataset: DatasetIndex, accelerator: Accelerator
) -> Scores:
    """Score `network` (bare, not wrapped for DDP) on the validation split; the same numbers on every process.

    All processes take process zero's weights and buffers first: running statistics of BatchNorm drift apart.
    RuntimeError where the certificate does not hold.
    """
    take_from_main(network, accelerator)
    split = dataset.split(config.data.val_split)
    sums, runs = _pass(network, task, config, dataset, accelerator)
    names = sorted(sums)
    vector = torch.stack([sums[name].cpu() for name in names])
    totals = dict(zip(names, SharedSums(vector.to(accelerator.device)).result(), strict=True))
    parts = [totals.pop(f"_digest{part}") for part in range(DIGEST_PARTS)]
    certificate = Certificate(
        split.samples, int(totals.pop("_seen")), distinct(gather_runs(runs)), joined_digest(parts)
    )
    certificate.check(split.keys_digest)
    return Scores(task.score(totals), certificate)


def take_from_main(network: torch.nn.Module, accelerator: Accelerator) -> None:
    """Overwrite weights and buffers with those of process zero."""
    if accelerator.num_processes > 1:
        for tensor in network.state_dict().values():
            tensor.copy_(broadcast(tensor, from_process=0))


def _pass(
    network: torch.nn.Module, task: Task, config: Config, dataset: DatasetIndex, accelerator: Accelerator
) -> tuple[Tally, Runs]:
    """This process's sums over its batches, and the numbers of the samples that were in them."""

    def work() -> Iterator[Work]:
        return evaluation_work(
            dataset.split(config.data.val_split).samples,
            batch=config.eval.batch,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )

    normalize = Normalizer(dataset, accelerator.device)
    # Also a process without a batch names every sum: the reduction needs the same vector everywhere.
    zero = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    sums: Tally = dict.fromkeys(task.sums, zero) | _proof_sums([])
    runs: Runs = []
    training = network.training
    network.eval()
    with torch.inference_mode():
        for batch in batches(config, dataset, accelerator, work, learning=False):
            inputs = normalize(batch)
            with accelerator.autocast():
                outputs = network(inputs.images)
            found = task.tally(outputs, inputs.targets, inputs.valid) | _proof_sums([batch])
            sums = {name: sums[name] + value for name, value in found.items()}
            add_to_runs(runs, batch.work.numbers)
    network.train(training)
    return sums, runs


def _proof_sums(batches: list[Batch]) -> Tally:
    """Samples delivered and the digest of their keys, as sums beside the task's own."""
    keys = [key for batch in batches for key in batch.keys]
    parts = digest_parts(sum(hash64(key.encode()) for key in keys) % 2**64)
    named = {f"_digest{part}": value for part, value in enumerate(parts)} | {"_seen": float(len(keys))}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in named.items()}


def evaluate_weights(request: Request, accelerator: Accelerator, dataset: DatasetIndex) -> None:
    """`run.py evaluate`: score saved weights, print the scores to the last digit, and keep them."""
    console = Console(active=accelerator.is_main_process and not request.flags.quiet, every_seconds=1)
    saved = read_weights(request, dataset)
    network = saved.network.to(accelerator.device)
    scores = evaluate(network, saved.task, request.config, dataset, accelerator)
    record = {"kind": "evaluate", "weights": str(saved.path), **scores.as_json()}
    if accelerator.is_main_process:
        saved.path.parent.joinpath(f"{saved.path.stem}.evaluation.json").write_text(
            json.dumps(record, indent=1) + "\n"
        )
    console.say(f"weights   {saved.path}")
    console.say(f"split     {request.config.data.val_split}, {describe(scores.certificate)}")
    console.say(f"digest    {scores.certificate.digest}")
    for name, value in scores.metrics.items():
        console.say(f"{name:<9} {value!r}")


def describe(certificate: Certificate) -> str:
    """The certificate in words."""
    return f"{certificate.seen} of {certificate.expected} samples, each once"
