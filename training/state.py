"""What a run must remember, as tensors by name and plain JSON: no pickle, and no generator has state to save.

The order of samples, their augmentation and dropout are pure functions of the seed and the step, so the step
is the whole cursor.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from data_pipeline.fault import UserError
from data_pipeline.index import DatasetIndex
from training.config import Config
from training.early_stop import Waiting
from training.schedules import PlateauState

MODEL_FILE = "model.safetensors"
AVERAGE_FILE = "ema.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
LINES = 10  # of a list of differences that are shown


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    step: int
    metric: str
    value: float


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # optimizer steps done
    evaluated: int = 0  # steps done at the last evaluation
    best: Best | None = None
    metrics_bytes: int = 0  # committed length of metrics.jsonl
    losses: float = 0.0  # sum of the steps' losses since the last evaluation
    counted: int = 0  # steps in that sum
    skipped: int = 0  # steps left out because they were not finite
    rescaled: int = 0  # steps left out because fp16 needed another scale
    nonfinite_row: int = 0  # steps in a row, up to here, that were not finite
    plateau: PlateauState = field(default_factory=PlateauState)
    thresholds: dict[str, list[float]] = field(default_factory=dict)  # of the weights "last" and "best"
    waiting: Waiting = field(default_factory=Waiting)  # for evaluations to show progress

    def as_json(self) -> dict[str, Any]:
        """For state.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Progress:
        """From state.json."""
        best = Best(**state["best"]) if state["best"] else None
        plateau, waiting = PlateauState(**state["plateau"]), Waiting(**state["waiting"])
        return cls(**{**state, "best": best, "plateau": plateau, "waiting": waiting})


def plan_identity(config: Config, dataset: DatasetIndex) -> dict[str, Any]:
    """Everything that the order of samples depends on; equal identities give equal batches."""
    return {
        "dataset": dataset.identity(),
        "data": _outline(dataset),
        "split": config.data.train_split,
        "seed": config.seed,
        "global_batch": config.train.global_batch,
        "lanes": config.lanes,
        "shuffle_block": config.data.shuffle_block,
        "balance": config.data.balance,
    }


def check_plan(recorded: dict[str, Any], config: Config, dataset: DatasetIndex) -> None:
    """RESUME, with what has changed, where the data set is not the one that the run started with."""
    now = plan_identity(config, dataset)
    if recorded["dataset"] != now["dataset"]:
        what = (
            f"data.root: '{config.data.location}' is not the data set of this run "
            f"(its dataset.json has changed: {recorded['dataset'][:12]} -> {now['dataset'][:12]})"
        )
        differences = _differences(recorded.get("data", now["data"]), now["data"])
        raise UserError(
            "\n".join([what, *shortened([f"it differs in {one}" for one in differences])]),
            mend="point --data.root at the data set of this run, or start anew: --fresh",
            code="RESUME",
        )


def _outline(dataset: DatasetIndex) -> dict[str, Any]:
    """What of a data set says in words how it differs from another one."""
    parts: dict[str, Any] = {"task": dataset.task, "image mode": dataset.image_mode}
    parts |= {"mean": list(dataset.mean), "deviation": list(dataset.std)}
    parts |= {"classes": len(dataset.classes)}
    parts |= {f"class {number}": name for number, name in enumerate(dataset.classes)}
    for name, split in dataset.splits.items():
        parts[f"samples of {name}"] = split.samples
        parts[f"keys of {name} (digest)"] = split.keys_digest
        parts[f"shards of {name}"] = len(split.shards)
    return parts


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = dict.fromkeys([*before, *now])
    found = [(name, before.get(name, "none"), now.get(name, "none")) for name in names]
    lines = [f"{name}: {old} -> {new}" for name, old, new in found if old != new]
    return lines or ["the shards of its splits: the same keys, in other files or in another order"]


def parameter_names(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters in its own numbering."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """The optimizer's state as "<quantity>/<parameter>" -> tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{quantity}/{names[number]}": value
        for number, quantities in state.items()
        for quantity, value in quantities.items()
        if isinstance(value, torch.Tensor)
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, torch.Tensor]
) -> None:
    """Put the tensors of `optimizer_tensors` back; RESUME names those that belong to another network."""
    numbers = {name: number for number, name in enumerate(names)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    faults = []
    for path, tensor in sorted(tensors.items()):
        quantity, _, name = path.partition("/")
        if name not in numbers:
            faults.append(f"{path}: no such parameter is learned")
        elif tensor.dim() and tensor.shape != parameters[numbers[name]].shape:
            own = list(parameters[numbers[name]].shape)
            faults.append(f"{path}: {list(tensor.shape)} in the file, {own} in the network")
        else:
            state.setdefault(numbers[name], {})[quantity] = tensor
    if faults:
        raise UserError(
            "\n".join(shortened([f"{OPTIMIZER_FILE} is not of this network: {fault}" for fault in faults])),
            mend="use the configuration that the checkpoint was made with",
            code="RESUME",
        )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_model(network: torch.nn.Module, tensors: dict[str, torch.Tensor], *, origin: str) -> None:
    """Load weights strictly; RESUME names those that are missing, unknown or of another shape or type."""
    own = network.state_dict()
    faults = [f"{name}: missing" for name in own.keys() - tensors.keys()]
    faults += [f"{name}: not in this network" for name in tensors.keys() - own.keys()]
    for name in own.keys() & tensors.keys():
        here, there = own[name], tensors[name]
        if here.shape != there.shape or here.dtype != there.dtype:
            faults.append(f"{name}: {_kind(there)} in the file, {_kind(here)} in the network")
    if faults:
        lines = shortened([f"'{origin}' does not fit the network: {fault}" for fault in sorted(faults)])
        raise UserError(
            "\n".join(lines),
            mend="use the configuration that the weights were made with",
            code="RESUME",
        )
    network.load_state_dict(tensors)


def shortened(lines: list[str]) -> list[str]:
    """The first lines of a list, and how many more there are."""
    more = len(lines) - LINES
    return lines if more <= 0 else [*lines[:LINES], f"and {more} more"]


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
