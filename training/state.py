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
from training.schedules import PlateauState

MODEL_FILE = "model.safetensors"
AVERAGE_FILE = "ema.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"


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
    plateau: PlateauState = field(default_factory=PlateauState)
    thresholds: dict[str, list[float]] = field(default_factory=dict)  # of the weights "last" and "best"

    def as_json(self) -> dict[str, Any]:
        """For state.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Progress:
        """From state.json."""
        best, plateau = state["best"], PlateauState(**state["plateau"])
        return cls(**{**state, "best": Best(**best) if best else None, "plateau": plateau})


def plan_identity(config: Config, dataset: DatasetIndex) -> dict[str, Any]:
    """Everything that the order of samples depends on; equal identities give equal batches."""
    return {
        "dataset": dataset.identity(),
        "split": config.data.train_split,
        "seed": config.seed,
        "global_batch": config.train.global_batch,
        "lanes": config.lanes,
        "shuffle_block": config.data.shuffle_block,
        "balance": config.data.balance,
    }


def check_plan(recorded: dict[str, Any], config: Config, dataset: DatasetIndex) -> None:
    """RESUME where the data set is not the one that the run started with."""
    now = plan_identity(config, dataset)
    if recorded["dataset"] != now["dataset"]:
        raise UserError(
            f"data.root: '{config.data.location}' is not the data set of this run "
            f"(its dataset.json has changed: {recorded['dataset'][:12]} -> {now['dataset'][:12]})",
            mend="point --data.root at the data set of this run, or start anew: --fresh",
            code="RESUME",
        )


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
    """Put the tensors of `optimizer_tensors` back."""
    numbers = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for path, tensor in tensors.items():
        quantity, _, name = path.partition("/")
        state.setdefault(numbers[name], {})[quantity] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_model(network: torch.nn.Module, tensors: dict[str, torch.Tensor], *, origin: str) -> None:
    """Load weights strictly; RESUME lists all that are missing, unknown or of another shape or type."""
    own = network.state_dict()
    faults = [f"{name}: missing" for name in own.keys() - tensors.keys()]
    faults += [f"{name}: not in this network" for name in tensors.keys() - own.keys()]
    for name in own.keys() & tensors.keys():
        here, there = own[name], tensors[name]
        if here.shape != there.shape or here.dtype != there.dtype:
            faults.append(f"{name}: {_kind(there)} in the file, {_kind(here)} in the network")
    if faults:
        raise UserError(
            "\n".join(f"'{origin}' does not fit the network: {fault}" for fault in sorted(faults)),
            mend="use the configuration that the weights were made with",
            code="RESUME",
        )
    network.load_state_dict(tensors)


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
