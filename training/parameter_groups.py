"""Which parameters share a rate and a decay: by pattern, by layer, and biases and norms apart."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any, NoReturn

import timm.models
import torch

from data_pipeline.fault import UserError
from training.config.optim import OptimConfig, ParameterGroup
from training.name_patterns import matches, with_modules

Groups = list[dict[str, Any]]


def parameter_groups(
    network: torch.nn.Module, config: OptimConfig, *, head: frozenset[str], trainable: frozenset[str]
) -> Groups:
    """The `trainable` parameters in groups of one rate and one decay, as torch.optim takes them.

    Each group also carries `peak_lr`, which its course of the rate starts from, and `name`, for people. The
    first of `config.groups` that matches a name takes it. Biases and norms (one dimension or none) do not
    decay unless their group says so. Raises CONFIG where a group takes nothing.
    """
    named = {name: parameter for name, parameter in network.named_parameters() if name in trainable}
    assert named.keys() == trainable, trainable - named.keys()
    if not named:
        raise UserError(
            "model.freeze: nothing is left to train",
            mend='except something, such as --model.freeze \'["*", "!head"]\'',
            code="CONFIG",
        )
    frozen = [name for name, _ in network.named_parameters() if name not in named]
    taken_by = _rules(config, named, head, frozen=frozen)
    layers = layers_of(network, head) if config.layer_decay < 1 else {}
    by_adamw = not_for_muon(network, head) if config.name == "muon" else frozenset()
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named.items():
        rule = taken_by.get(name)
        bare = parameter.ndim <= 1 and (rule is None or rule.weight_decay is None)
        # Where nothing decays there is no difference to tell.
        bare = bare and config.weight_decay > 0
        words = [rule.match if rule else "the others" if config.groups else "all"]
        words += [f"layer {layers[name] + 1} of {max(layers.values()) + 1}"] if layers else []
        words += ["biases and norms"] if bare else []
        words += ["by AdamW"] if name in by_adamw else []
        title = ", ".join(words)
        if title not in groups:
            lr = config.lr if rule is None or rule.lr is None else rule.lr
            decay = config.weight_decay if rule is None or rule.weight_decay is None else rule.weight_decay
            share = config.layer_decay ** (max(layers.values()) - layers[name]) if layers else 1.0
            group = {"params": [], "peak_lr": lr * share, "weight_decay": 0.0 if bare else decay}
            groups[title] = {**group, "lr": lr * share, "name": title}
            if config.name == "muon":
                groups[title]["use_fallback"] = name in by_adamw
        groups[title]["params"].append(parameter)
    return list(groups.values())


def describe_groups(optimizer: torch.optim.Optimizer) -> list[str]:
    """A line for each group: what is in it, how many numbers, its highest rate and its decay."""
    return [
        f"{group['name']}: {_count(sum(one.numel() for one in group['params']))}, "
        f"rate {group['peak_lr']:.4g}, decay {group['weight_decay']:.4g}"
        for group in optimizer.param_groups
    ]


def layers_of(network: torch.nn.Module, head: frozenset[str]) -> dict[str, int]:
    """Name of each parameter -> number of its layer, from 0 at the input; the last is the head's.

    As timm groups its networks' layers; elsewhere the top-level children, in the order in which they were
    defined, are the layers (of the one child, where there is one only). Raises CONFIG where all is one layer.
    """
    names = [name for name, _ in network.named_parameters()]
    of_timm: Any = getattr(network, "group_matcher", None)
    if of_timm is not None:
        found: dict[str, int] = timm.models.group_parameters(network, of_timm(coarse=False), reverse=True)
        layers = {name: found.get(name, max(found.values())) for name in names}
    else:
        paths = {name: name.split(".") for name in names if name not in head}
        shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths.values(), strict=False))
        inside = len(list(shared))
        # A module's own parameters, such as tables of positions, are one layer.
        child = {name: path[inside] if path[inside + 1 :] else None for name, path in paths.items()}
        number = {one: count for count, one in enumerate(dict.fromkeys(child.values()))}
        layers = {name: len(number) if name in head else number[child[name]] for name in names}
    if len(set(layers.values())) < 2:
        raise UserError(
            "optim.layer_decay: the network has one layer only",
            mend="set --optim.layer-decay 1, or give rates by --optim.groups",
            code="CONFIG",
        )
    return layers


def not_for_muon(network: torch.nn.Module, head: frozenset[str]) -> frozenset[str]:
    """The parameters that Muon leaves to AdamW: biases, norms, embeddings, the input's layer and the head's.

    Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024).
    """
    inputs = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    modules = dict(network.named_modules())
    first = next((name for name, module in modules.items() if isinstance(module, inputs)), None)
    embedding = {name for name, module in modules.items() if isinstance(module, torch.nn.Embedding)}
    # timm's tables of positions, which it does not let decay either.
    of_timm: Any = getattr(network, "no_weight_decay", tuple)
    tables = of_timm()
    return frozenset(
        name
        for name, parameter in network.named_parameters()
        if parameter.ndim <= 1
        or name in head
        or name in tables
        or name.rpartition(".")[0] in embedding | {first}
    )


def _rules(
    config: OptimConfig, named: Iterable[str], head: frozenset[str], *, frozen: list[str]
) -> Mapping[str, ParameterGroup]:
    """Which of `config.groups` takes each parameter; those that none takes are left out."""
    taken: dict[str, ParameterGroup] = {}
    for rule in config.groups:
        found = [name for name in named if matches(rule.match, name, head=head)]
        free = [name for name in found if name not in taken]
        if not free:
            if found:
                _refuse(rule, f"all that it matches is taken by the groups before it, such as '{found[0]}'")
            elif still := [name for name in frozen if matches(rule.match, name, head=head)]:
                _refuse(rule, f"all that it matches is frozen, such as '{still[0]}'")
            _refuse(rule, f"no parameter is called so; near it: {', '.join(_near(rule.match, named))}")
        taken |= dict.fromkeys(free, rule)
    return taken


def _refuse(rule: ParameterGroup, why: str) -> NoReturn:
    raise UserError(
        f"optim.groups: {rule.match!r}: {why}",
        mend="give part of a name with *, a module's name, head or body",
        code="CONFIG",
    )


def _near(pattern: str, names: Iterable[str]) -> list[str]:
    """Names of parameters and modules that the pattern may have meant."""
    whole = with_modules(names)
    close = difflib.get_close_matches(pattern.rstrip(".*"), whole, n=4)
    return close or [name for name in whole if "." not in name][:8]


def _count(numbers: int) -> str:
    return f"{numbers:,}" if numbers < 10_000 else f"{numbers / 1e6:.3g} M"
