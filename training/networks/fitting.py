"""Which tensors of a file go where in a network, and everything that stands against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from training.networks.first_convolution import adapted
from training.networks.names import Renaming, best_renaming

COUNTER = (
    ".num_batches_tracked"  # of BatchNorm; files from before 2018 lack it, and weights do not depend on it
)

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Fitting:
    """What fits, in the network's order, and what does not. The lists hold "name: what about it"."""

    renaming: Renaming
    values: dict[str, torch.Tensor] = field(default_factory=dict)  # by the network's names, in its formats
    adapted: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def fit(
    file: Tensors, network: Tensors, *, head: frozenset[str], first: str | None, channels: int
) -> Fitting:
    """Compare the tensors of a file with a network's.

    The names in `head` may have another shape or be absent. Absent may be, too, what lies outside the part of
    the network that the file is for (`encoder.`), and BatchNorm's counters. `first` names the weight that
    sees the picture's `channels`, and is carried to them. Every other difference is in `refused`.
    """
    fitting = Fitting(best_renaming(_shapes(file), _shapes(network)))
    new_names = {name: fitting.renaming(name) for name in file}
    pairs = {new: name for name, new in new_names.items() if new is not None}
    inside = fitting.renaming.add
    outside = [name for name in network if not name.startswith(inside)]
    if outside:
        fitting.skipped.append(f"{len(outside)} tensors outside '{inside}': none in the file")
    for name, here in network.items():
        if name not in pairs:
            if name in head and name.startswith(inside):
                fitting.skipped.append(f"{name}: not in the file, {list(here.shape)} here")
            elif name.startswith(inside) and not name.endswith(COUNTER):
                fitting.refused.append(f"{name}: not in the file, {list(here.shape)} here")
            continue
        there = file[pairs[name]]
        difference = f"{name}: {list(there.shape)} in the file, {list(here.shape)} here"
        if name == first and there.shape != here.shape:
            carried = adapted(there, channels=channels)
            if carried is not None and carried.shape == here.shape:
                fitting.adapted.append(difference)
                there = carried
        if there.shape != here.shape:
            (fitting.skipped if name in head else fitting.refused).append(difference)
        elif there.is_floating_point() != here.is_floating_point():
            fitting.refused.append(f"{name}: {_format(there)} in the file, {_format(here)} here")
        else:
            if there.dtype != here.dtype and there.is_floating_point():
                fitting.converted.append(f"{name}: {_format(there)} to {_format(here)}")
            fitting.values[name] = there.to(here.dtype)
    fitting.unknown.extend(name for name, new in new_names.items() if new not in network)
    return fitting


def _shapes(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _format(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
