"""Watches one pass through a network for the first layer that makes what is not finite of what is.

A layer that merely passes it on is not the one. Hooks of tensors are used on the way back, because those of
modules do not go with operations that work in place. Shapes: B samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

NETWORK = "the network"  # the name of the outermost module


class Culprit(NamedTuple):
    """The layer, how many layers came before it in the pass, and whose rows [B] are not finite."""

    layer: str
    before: int
    rows: list[int]
    end: str = "output"  # the end of the layer where they were seen: "input" or "output"


class ForwardWatch:
    """Of one forward pass of `samples` samples."""

    def __init__(self, samples: int) -> None:
        self.culprit: Culprit | None = None
        self.outputs: Any = None  # of the last module to finish: in the end, the network
        self._samples, self._before = samples, 0

    @contextlib.contextmanager
    def over(self, network: torch.nn.Module) -> Iterator[None]:
        """Inside, a forward pass is watched."""
        handles = [
            module.register_forward_hook(partial(self._left, name), with_kwargs=True)
            for name, module in network.named_modules()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _left(self, name: str, _module: object, given: object, named: object, outputs: object) -> None:
        # Layers finish from the inside out: the first of several that hold one another is the innermost.
        self.outputs = outputs
        if self.culprit is None and not all_finite(outputs) and all_finite((given, named)):
            self.culprit = Culprit(name or NETWORK, self._before, rows_not_finite(outputs, self._samples))
        self._before += 1


class BackwardWatch:
    """Of the backward pass that follows one forward pass of `samples` samples."""

    def __init__(self, samples: int) -> None:
        self._samples, self._before = samples, 0
        self._outputs: set[str] = set()  # layers that were given a gradient that is not finite
        self._seen: list[tuple[str, int, Culprit]] = []  # gradients of inputs: what was it, of which tensor
        self._first: Culprit | None = None

    @property
    def culprit(self) -> Culprit | None:
        """Found after the pass: NETWORK where the gradient of its outputs was not finite to begin with."""
        if self._first is None or NETWORK in self._outputs:
            return self._first and self._first._replace(layer=NETWORK)
        makers = [seen for seen in self._seen if seen[0] not in self._outputs]
        if not makers:  # it arose between layers, in the network's own arithmetic
            return self._first
        # Modules that hold one another may share an input: the innermost is the last to be given it.
        return [maker for _, tensor, maker in makers if tensor == makers[0][1]][-1]

    @contextlib.contextmanager
    def over(self, network: torch.nn.Module) -> Iterator[None]:
        """Inside, a forward pass and its backward pass are watched."""
        handles = []
        for name, module in network.named_modules():
            entered = partial(self._entered, name or NETWORK)
            handles.append(module.register_forward_pre_hook(entered, with_kwargs=True))
            handles.append(module.register_forward_hook(partial(self._left, name or NETWORK)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entered(self, name: str, _module: object, given: object, named: object) -> None:
        for tensor in tensors_in((given, named)):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._input, name, id(tensor)))  # type: ignore[no-untyped-call]

    def _left(self, name: str, _module: object, _given: object, outputs: object) -> None:
        for tensor in tensors_in(outputs):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._output, name))  # type: ignore[no-untyped-call]

    def _output(self, name: str, gradient: torch.Tensor) -> None:
        if self._noted(name, gradient, "output") is not None:
            self._outputs.add(name)

    def _input(self, name: str, tensor: int, gradient: torch.Tensor) -> None:
        culprit = self._noted(name, gradient, "input")
        if culprit is not None:
            self._seen.append((name, tensor, culprit))

    def _noted(self, name: str, gradient: torch.Tensor, end: str) -> Culprit | None:
        self._before += 1
        if all_finite(gradient):
            return None
        culprit = Culprit(name, self._before, rows_not_finite(gradient, self._samples), end)
        self._first = self._first or culprit
        return culprit


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Tensors of floating-point numbers in what a module takes or gives."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


def all_finite(value: object) -> bool:
    """Whether all numbers are, in all tensors of `value`."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors_in(value))


def rows_not_finite(value: object, samples: int) -> list[int]:
    """Which of `samples` samples have a number that is not finite; all where no tensor has rows of samples.

    A tensor may have several rows a sample, one after the other, as windows of pictures do.
    """
    found: set[int] = set()
    for tensor in tensors_in(value):
        if tensor.ndim and len(tensor) and len(tensor) % samples == 0:
            finite_B = tensor.detach().isfinite().reshape(samples, -1).all(dim=1)
            found |= {row for row, finite in enumerate(finite_B.tolist()) if not finite}
    return sorted(found) or list(range(samples))
