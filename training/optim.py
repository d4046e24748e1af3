"""How weights change: update rules by name, and what of their state is no tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.optim.lamb import Lamb
from timm.optim.lion import Lion
from timm.optim.muon import Muon

from data_pipeline.fault import UserError, first_line
from training.config.arguments import checked_arguments
from training.config.optim import OptimConfig
from training.parameter_groups import parameter_groups

ELSEWHERE = {
    "params": "optim.groups",
    "lr": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "momentum": "optim.momentum",
}
# What a group has beside its rule's arguments from the beginning.
GIVEN = {"params", "peak_lr", "name", "use_fallback"}


class Rule(NamedTuple):
    """An update rule: its class, and the arguments that the configuration gives it."""

    make: Callable[..., torch.optim.Optimizer]
    arguments: dict[str, Any]


def sgd(config: OptimConfig) -> Rule:
    """Nesterov momentum; weight decay is added to the gradient."""
    return Rule(torch.optim.SGD, {"momentum": config.momentum, "nesterov": config.momentum > 0})


def adam(config: OptimConfig) -> Rule:
    """Weight decay is added to the gradient. Source: Kingma and Ba (ICLR 2015)."""
    return Rule(torch.optim.Adam, {"betas": (config.momentum, 0.999)})


def adamw(config: OptimConfig) -> Rule:
    """Adam with decoupled weight decay. Source: Loshchilov and Hutter (ICLR 2019)."""
    return Rule(torch.optim.AdamW, {"betas": (config.momentum, 0.999)})


def rmsprop(config: OptimConfig) -> Rule:
    """Weight decay is added to the gradient. Source: Tieleman and Hinton, lecture 6.5 (2012)."""
    return Rule(torch.optim.RMSprop, {"momentum": config.momentum})


def nadam(config: OptimConfig) -> Rule:
    """Adam with Nesterov momentum. Source: Dozat (ICLR 2016 workshop)."""
    return Rule(torch.optim.NAdam, {"betas": (config.momentum, 0.999)})


def lamb(config: OptimConfig) -> Rule:
    """Adam with a rate for each tensor by its norm. Source: You et al. (ICLR 2020).

    timm's own clipping is off: `optim.clip_norm` says whether the gradient is clipped.
    """
    return Rule(Lamb, {"betas": (config.momentum, 0.999), "max_grad_norm": None})


def lion(config: OptimConfig) -> Rule:
    """The sign of a momentum. Source: Chen et al. (NeurIPS 2023)."""
    return Rule(Lion, {"betas": (config.momentum, 0.99)})


def muon(config: OptimConfig) -> Rule:
    """Orthogonalised momentum for hidden matrices, AdamW for all else. Source: Jordan et al. (2024)."""
    return Rule(Muon, {"momentum": config.momentum})


OPTIMIZERS: dict[str, Callable[[OptimConfig], Rule]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "rmsprop": rmsprop,
    "nadam": nadam,
    "lamb": lamb,
    "lion": lion,
    "muon": muon,
}


def build_optimizer(
    network: torch.nn.Module,
    config: OptimConfig,
    *,
    head: frozenset[str],
    trainable: frozenset[str],
    device_type: str,
) -> torch.optim.Optimizer:
    """The optimizer of the parameters named in `trainable`, whether or not they are frozen as yet.

    On a CUDA device the fused kernels of torch are used where the rule has them. Raises CONFIG where
    `config.arguments` or `config.groups` do not fit.
    """
    make, arguments = OPTIMIZERS[config.name](config)
    option = f"optim.arguments of {config.name}"
    own = checked_arguments(config.arguments, make, option=option, elsewhere=ELSEWHERE)
    arguments |= own
    if device_type == "cuda" and _takes_fused(make) and not own.keys() & {"fused", "foreach"}:
        arguments["fused"] = True
    _try_out(make, arguments, config)
    return make(parameter_groups(network, config, head=head, trainable=trainable), lr=config.lr, **arguments)


def optimizer_numbers(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What of the optimizer's state is no parameter's tensor, for JSON; empty for most update rules.

    The numbers that a group gains by stepping (LAMB counts there), by the group's number, and those among a
    parameter's state (Muon notes its choice there), by the parameter's.
    """
    state = optimizer.state_dict()
    groups = {
        str(number): {
            name: _plain(value)
            for name, value in group.items()
            if name not in GIVEN and name not in optimizer.defaults
        }
        for number, group in enumerate(state["param_groups"])
    }
    states = {
        str(number): {name: value for name, value in of.items() if not isinstance(value, torch.Tensor)}
        for number, of in sorted(state["state"].items())
    }
    kept = {
        "groups": {number: of for number, of in groups.items() if of},
        "states": {number: of for number, of in states.items() if of},
    }
    return {**kept, "sizes": _sizes(optimizer)} if any(kept.values()) else {}


def load_optimizer_numbers(optimizer: torch.optim.Optimizer, numbers: dict[str, Any]) -> None:
    """Put the numbers of `optimizer_numbers` back, after the tensors; RESUME where the groups are others."""
    if not numbers:
        return
    if numbers["sizes"] != _sizes(optimizer):
        raise UserError(
            "optim: the optimizer's state belongs to other groups of parameters "
            f"(sizes {numbers['sizes']}, now {_sizes(optimizer)})",
            mend="go back to the groups that the run was started with, or start anew: --fresh",
            code="RESUME",
        )
    state = optimizer.state_dict()
    for number, of in numbers["groups"].items():
        state["param_groups"][int(number)] |= of
    for number, of in numbers["states"].items():
        state["state"].setdefault(int(number), {}).update(of)
    # The library's own way in: it makes a tensor of a number where it keeps one as such.
    optimizer.load_state_dict(state)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _sizes(optimizer: torch.optim.Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


def _takes_fused(make: Callable[..., torch.optim.Optimizer]) -> bool:
    return "fused" in inspect.signature(make).parameters


def _try_out(
    make: Callable[..., torch.optim.Optimizer], arguments: dict[str, Any], config: OptimConfig
) -> None:
    """Take a step with a matrix and a vector: some update rules look at their arguments only then."""
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape in ((8, 8), (8,))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    try:
        optimizer = make(weights, lr=config.lr, **arguments)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        if not all(bool(weight.isfinite().all()) for weight in weights):
            raise ValueError("the first step gives weights that are not finite")
    except Exception as error:
        raise UserError(
            f"optim.name: {config.name} does not work with optim.lr {config.lr:g}, optim.momentum "
            f"{config.momentum:g} and optim.arguments {config.arguments}: {first_line(error)}",
            mend="run.py --help lists what it takes",
            code="CONFIG",
        ) from error
