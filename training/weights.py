"""What a user takes away: weights/{best,last}.safetensors for the bare network, and model.json."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data_pipeline.disk import replace_file
from data_pipeline.fault import UserError
from data_pipeline.index import DatasetIndex
from training.command import Request
from training.config import Config
from training.networks.classifiers import classifier
from training.state import MODEL_FILE, load_model
from training.tasks import TASKS
from training.tasks.task import Task

FORMAT = 1
MODEL_JSON = "model.json"


@dataclass(frozen=True)
class SavedWeights:
    """A network with weights from a file, and its task."""

    path: Path
    network: torch.nn.Module
    task: Task


def export_weights(
    checkpoint: Path, folder: Path, config: Config, dataset: DatasetIndex, *, best: bool
) -> None:
    """Copy the model of a committed checkpoint to `folder`/last and, if it is the best, /best."""
    about = {
        "format": FORMAT,
        "task": config.task,
        "classes": list(dataset.classes),
        "network": {"library": "timm", "name": config.model.name, "channels": dataset.channels},
        "image": {"mode": dataset.image_mode, "mean": list(dataset.mean), "std": list(dataset.std)},
        "transforms": config.model_dump(mode="json")["data"]["eval_transforms"],
    }
    text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    for name in ("last", "best") if best else ("last",):
        replace_file(
            folder / f"{name}.safetensors", lambda part: shutil.copyfile(checkpoint / MODEL_FILE, part)
        )
    replace_file(folder / MODEL_JSON, lambda part: part.write_text(text, encoding="utf-8"))


def read_weights(request: Request, dataset: DatasetIndex) -> SavedWeights:
    """The network that `--weights` names, on the CPU; DATA if there is none, RESUME if it does not fit."""
    name = request.flags.weights
    path = request.run_dir / "weights" / f"{name}.safetensors" if name in ("best", "last") else Path(name)
    try:
        about = json.loads((path.parent / MODEL_JSON).read_text(encoding="utf-8"))
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"--weights: cannot read '{path}' with its {MODEL_JSON}: {error}",
            mend="train first, or name a run with --run-dir DIR, or a file with --weights FILE.safetensors",
        ) from None
    if about["classes"] != list(dataset.classes):
        raise UserError(
            f"'{path}' tells {len(about['classes'])} classes apart, the data set has {len(dataset.classes)}, "
            "or they have other names",
            mend="evaluate on a data set with the classes of training: --data.root DIR",
        )
    task = TASKS[about["task"]](len(about["classes"]))
    made_for = about["network"]
    network = classifier(
        made_for["name"], channels=made_for["channels"], outputs=task.outputs, pretrained=False
    )
    load_model(network, tensors, origin=str(path))
    return SavedWeights(path, network, task)
