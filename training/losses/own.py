"""A loss of the user's, by import path: a function, or a class that makes one.

Shapes: B samples; the outputs and targets are those of the task.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch

from training.config.loss import OwnLoss
from training.losses.elements import Labels, along, refused, visible
from training.objective import Term, mean_term
from training.plugins import load_plugin

OPTION = "--loss"


def own_loss(path: str, spec: OwnLoss, labels: Labels) -> Term:
    """The loss at `path`; CONFIG where it is none.

    It is called as `function(outputs, targets)`, float32 outputs and the task's targets as they are, and
    gives a loss for each sample or element: float [B, ...]. Those of samples that do not count are left out,
    and those of missing labels and ignored pixels where the shape tells which they are. If it has a parameter
    `weights`, it is given those of the samples, float32 [B], and gives a total and a count, both of which are
    added up over the global batch, and then divided.
    """
    call = _Call(path, spec)

    def sums(outputs: torch.Tensor, targets: torch.Tensor, weights_B: torch.Tensor) -> torch.Tensor:
        found = call(visible(outputs, along(weights_B > 0, outputs)), targets, weights_B)
        if call.takes_weights:
            total, count = _total_and_count(path, found, outputs)
        else:
            each = _each(path, found, outputs)
            share = torch.where(_counting(each, labels, targets, weights_B), along(weights_B, each), 0.0)
            total = torch.where(share > 0, each * share, 0.0).sum()
            count = share.sum(dtype=torch.float64)
        return torch.stack([total, count.to(total.dtype)])

    return mean_term(sums, None)


class _Call:
    """The user's function with its arguments, on the device of the outputs."""

    def __init__(self, path: str, spec: OwnLoss) -> None:
        found, arguments = load_plugin(path, option=OPTION), spec.arguments
        if isinstance(found, type):
            _check_call(path, found, **arguments)
            found, arguments = found(**arguments), {}
        if not callable(found):
            raise refused(
                f"{OPTION}: {path!r} is a {type(found).__name__}, which cannot be called",
                mend="name a function(outputs, targets), or a class that makes one",
            )
        self._module = found if isinstance(found, torch.nn.Module) else None
        if self._module is not None and list(self._module.parameters()):
            raise refused(
                f"{OPTION}: {path!r} has parameters of its own, which nothing would train",
                mend="make them part of the network, or buffers if they are fixed",
            )
        plain: Callable[..., Any] = found if self._module is None else self._module.forward
        self.takes_weights = "weights" not in arguments and "weights" in _parameters(plain)
        weights = {"weights": None} if self.takes_weights else {}
        _check_call(path, plain, None, None, **arguments, **weights)
        self._function = partial(found, **arguments)

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor, weights_B: torch.Tensor) -> Any:
        if self._module is not None:
            # Buffers that are moved in the inference mode of an evaluation could not be trained with.
            with torch.inference_mode(False):
                self._module.to(outputs.device)
        if self.takes_weights:
            return self._function(outputs, targets, weights=weights_B)
        return self._function(outputs, targets)


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # written in C, without a signature
        return []
    return [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]


def _check_call(path: str, function: Callable[..., Any], *given: object, **named: object) -> None:
    """CONFIG where the function does not take these arguments."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # written in C, without a signature
        return
    try:
        signature.bind(*given, **named)
    except TypeError as error:
        takes = f"{OPTION}: {path!r} takes {signature}"
        raise refused(
            f"{takes}, which does not fit: {error}",
            mend="it is called with outputs and targets; a class, first with the configured arguments",
        ) from error


def _counting(
    each: torch.Tensor, labels: Labels, targets: torch.Tensor, weights_B: torch.Tensor
) -> torch.Tensor:
    """Bool, the shape of the losses."""
    counting = labels.counting(targets, weights_B)
    if each.shape == counting.shape:
        return counting
    if each.ndim == counting.ndim + 1 and each.shape[2:] == counting.shape[1:]:
        return counting.unsqueeze(1).expand_as(each)
    return along(weights_B > 0, each)


def _each(path: str, found: object, outputs: torch.Tensor) -> torch.Tensor:
    if not isinstance(found, torch.Tensor):
        _refuse(path, f"a {type(found).__name__}, no tensor")
    if found.ndim == 0:
        _refuse(path, "a single number for the batch")
    if len(found) != len(outputs) or 0 in found.shape[1:]:
        _refuse(path, f"losses of shape {list(found.shape)} for a batch of {len(outputs)}")
    return _checked(path, found, outputs)


def _total_and_count(path: str, found: object, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(found, tuple) or len(found) != 2:
        _refuse(path, f"a {type(found).__name__}, no total and count")
    total, count = found
    if not isinstance(total, torch.Tensor) or total.ndim:
        _refuse(path, "a total that is no 0-dimensional tensor")
    if not isinstance(count, int | float) and not (isinstance(count, torch.Tensor) and count.ndim == 0):
        _refuse(path, "a count that is no number")
    return _checked(path, total, outputs), torch.as_tensor(count, device=total.device)


def _checked(path: str, found: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    if not found.is_floating_point():
        _refuse(path, f"losses of type {str(found.dtype).removeprefix('torch.')}")
    if outputs.requires_grad and torch.is_grad_enabled() and not found.requires_grad:
        _refuse(path, "losses without a gradient: they were detached from the outputs")
    return found.float()


def _refuse(path: str, gave: str) -> NoReturn:
    raise refused(
        f"{OPTION}: {path!r} gave {gave}",
        mend="give a loss per sample or element (reduction='none'), or take weights and give (total, count)",
    )
