"""What a user takes away: weights/{best,last}.safetensors for the bare network, and model.json.

model.json says all that is needed to use the weights without this program: how the network is built, what its
outputs mean, how pictures are prepared.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data_pipeline.fault import UserError
from data_pipeline.index import DatasetIndex
from training.checkpoints.weight_copies import MODEL_JSON as MODEL_JSON
from training.command import Request
from training.config.loss import LossTerms
from training.inputs import Normalizer
from training.job import Job
from training.losses import Labels
from training.networks.build import library_of, network_like
from training.state import load_model
from training.tasks import make_task
from training.tasks.task import Task

FORMAT = 2


@dataclass(frozen=True)
class SavedWeights:
    """A network with weights from a file on the CPU, its task, and what model.json says of it."""

    path: Path
    network: torch.nn.Module
    task: Task
    about: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the outputs' classes or labels."""
        return tuple(self.about["classes"])

    @property
    def thresholds(self) -> list[float] | None:
        """Probabilities chosen on the validation split for these very weights."""
        chosen: dict[str, list[float]] = self.about["thresholds"]
        return chosen.get(self.path.stem)

    def normalizer(self, device: torch.device) -> Normalizer:
        """As in training: whatever other pictures the network is used on."""
        return Normalizer(self.about["image"]["mean"], self.about["image"]["std"], device)


def about_model(job: Job) -> str:
    """The text of model.json as the job stands."""
    config, dataset, labels = job.config, job.dataset, job.labels
    written = config.model_dump(mode="json")
    mean, std = job.pixel_statistics
    content = {
        "format": FORMAT,
        "task": config.task,
        "classes": list(dataset.classes),
        "network": library_of(
            config.model.name,
            channels=dataset.channels,
            outputs=labels.outputs,
            arguments=written["model"]["arguments"],
        ),
        "loss": written["loss"],
        "class_counts": {"positives": list(labels.positives), "negatives": list(labels.negatives)},
        "image": {"mode": dataset.image_mode, "mean": list(mean), "std": list(std)},
        "transforms": written["data"]["eval_transforms"],
        "mask_values": list(dataset.mask_values),
        "thresholds": job.progress.thresholds,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_weights(request: Request) -> SavedWeights:
    """The network that `--weights` names, on the CPU; DATA if there is none, RESUME if it does not fit."""
    name = request.flags.weights
    path = request.run_dir / "weights" / f"{name}.safetensors" if name in ("best", "last") else Path(name)
    try:
        about = json.loads((path.parent / MODEL_JSON).read_text(encoding="utf-8"))
        tensors = load_file(path)
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']}, this version reads {FORMAT}")
        network, task = _built(about)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--weights: cannot read '{path}' with its {MODEL_JSON}: {error}",
            mend="train first, or name a run with --run-dir DIR, or a file with --weights FILE.safetensors",
        ) from None
    load_model(network, tensors, origin=str(path))
    return SavedWeights(path, network.eval(), task, about)


def _built(about: dict[str, Any]) -> tuple[torch.nn.Module, Task]:
    made_for, counts = about["network"], about["class_counts"]
    labels = Labels(
        task=about["task"],
        classes=len(about["classes"]),
        outputs=made_for["outputs"],
        positives=tuple(counts["positives"]),
        negatives=tuple(counts["negatives"]),
    )
    loss = LossTerms.model_validate(about["loss"])
    network = network_like(made_for, task=labels.task, outputs=labels.outputs)
    return network, make_task(labels, loss)


def check_fits(saved: SavedWeights, dataset: DatasetIndex) -> None:
    """DATA where a data set is not of the kind that the weights were made for."""
    what, about = None, saved.about
    if about["task"] != dataset.task:
        what = f"is for {about['task']}, the data set for {dataset.task}"
    elif about["classes"] != list(dataset.classes):
        what = (
            f"tells {len(about['classes'])} classes apart, the data set has {len(dataset.classes)}, "
            "or they have other names"
        )
    elif about["image"]["mode"] != dataset.image_mode:
        what = f"is for pictures of mode {about['image']['mode']}, the data set's are {dataset.image_mode}"
    if what:
        raise UserError(
            f"'{saved.path}' {what}",
            mend="use a data set that was packed like that of training: --data.root DIR",
        )
