"""What is learned, which elements of a batch count, and a loss that is a mean over those.

An element is a sample (multiclass), a label of a sample (multilabel) or a pixel (segmentation).
Shapes: B samples, C classes or labels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from data_pipeline.fault import UserError
from data_pipeline.masks import IGNORED
from data_pipeline.shard_index import MISSING
from training.objective import Term, mean_term

Constant = Callable[[torch.device], torch.Tensor]
ElementLosses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # outputs, targets -> as targets


@dataclass(frozen=True)
class Labels:
    """What is learned: the task, its classes, the network's outputs, and how often each class occurs."""

    task: str  # multiclass, multilabel or segmentation
    classes: int
    outputs: (
        int  # channels of the output: one a class, or a single one that tells two classes of pixels apart
    )
    positives: tuple[int, ...]  # [C] samples or pixels of each class in the training split
    negatives: tuple[int, ...]  # [C] samples or pixels known not to be; a missing label is in neither

    @property
    def yes_or_no(self) -> bool:
        """Whether each output is the logit of a yes, rather than one of the logits of a softmax."""
        return self.task == "multilabel" or (self.task == "segmentation" and self.outputs == 1)

    def counting(self, targets: torch.Tensor, weights_B: torch.Tensor) -> torch.Tensor:
        """Bool, the shape of the targets: what is known, of the samples that count."""
        counting = along(weights_B > 0, targets)
        if self.task == "multilabel":
            return counting & (targets != MISSING)
        return counting & (targets != IGNORED) if self.task == "segmentation" else counting


def along(values_B: torch.Tensor, elements: torch.Tensor) -> torch.Tensor:
    """A value for each sample, as one for each of its elements."""
    return values_B.reshape(-1, *(1,) * (elements.ndim - 1)).expand_as(elements)


def visible(outputs: torch.Tensor, counting: torch.Tensor) -> torch.Tensor:
    """The outputs, 0 where they do not count.

    A loss is masked before it is computed as well as after: masked only after, a zero meets the derivative of
    what does not count, and 0 * inf is NaN.
    """
    return torch.where(counting if outputs.ndim == counting.ndim else counting.unsqueeze(1), outputs, 0.0)


def constant(values: tuple[float, ...]) -> Constant:
    """Float32 numbers, moved to each device once."""

    @cache
    def on(device: torch.device) -> torch.Tensor:
        # An evaluation may ask first: a tensor that is made in its inference mode could not be trained with.
        with torch.inference_mode(False):
            return torch.tensor(values, dtype=torch.float32, device=device)

    return on


def mean_over_elements(labels: Labels, losses: ElementLosses, class_weights: Constant | None = None) -> Term:
    """The total of the losses of all that counts, by its number; or by its weight, if classes have one.

    `losses(outputs, targets)` gives float32 of the targets' shape, finite also where nothing counts: there,
    outputs and targets are 0. With `class_weights` they are weighted already.
    """

    def shares(targets: torch.Tensor, weights_B: torch.Tensor) -> torch.Tensor:
        if labels.task == "multiclass":  # every target is known: no operation is spent on finding that out
            return weights_B
        return torch.where(labels.counting(targets, weights_B), along(weights_B, targets), 0.0)

    def count(targets: torch.Tensor, weights_B: torch.Tensor) -> torch.Tensor:
        return count_of(shares(targets, weights_B), targets)

    def count_of(counted: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if class_weights is not None:
            known = torch.where(counted > 0, targets, 0).long()
            counted = counted * class_weights(targets.device)[known]
        return counted.sum(dtype=torch.float64)

    def sums(outputs: torch.Tensor, targets: torch.Tensor, weights_B: torch.Tensor) -> torch.Tensor:
        share = shares(targets, weights_B)
        counting = share > 0
        each = losses(visible(outputs, counting), torch.where(counting, targets, 0))
        total = (each * share).sum()
        return torch.stack([total, count_of(share, targets).to(total.dtype)])

    samples = labels.task == "multiclass" and class_weights is None
    return mean_term(sums, count, counts_samples=samples)


def refused(what: str, *, mend: str) -> UserError:
    """What to raise where a loss is told something that it cannot do."""
    return UserError(what, mend=mend, code="CONFIG")
