"""Losses of overlapping areas, which are summed over the whole global batch before they are divided.

Shapes: B samples, C outputs, H W pixels, K classes that are taken.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from training.config.loss import Dice, Iou, Overlap, Tversky
from training.losses.elements import Labels, along, refused, visible
from training.objective import Term

AreaLosses = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # areas [K] -> losses [K]

# An area in pixels, or a loss, below which there is only rounding; float32 holds slopes of 1 / NOTHING.
NOTHING = 1e-12


def dice(spec: Dice, labels: Labels) -> Term:
    """1 - (2 both + s) / (predicted + true + s). Source: Milletari et al., V-Net (3DV 2016)."""

    def losses(both: torch.Tensor, predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        return 1 - _ratio(2 * both + spec.smooth, predicted + true + spec.smooth)

    return _overlap("dice", spec, labels, losses)


def iou(spec: Iou, labels: Labels) -> Term:
    """1 - (both + s) / (predicted + true - both + s), the Jaccard index."""

    def losses(both: torch.Tensor, predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        return 1 - _ratio(both + spec.smooth, predicted + true - both + spec.smooth)

    return _overlap("iou", spec, labels, losses)


def tversky(spec: Tversky, labels: Labels) -> Term:
    """(1 - (both + s) / (both + alpha * wrongly predicted + beta * missed + s))^gamma, of each class.

    Sources: Salehi et al. (MLMI 2017); the power: Abraham and Khan (ISBI 2019), whose gamma is one by ours.
    """

    def losses(both: torch.Tensor, predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        wrong = spec.alpha * (predicted - both) + spec.beta * (true - both)
        missing = 1 - _ratio(both + spec.smooth, both + wrong + spec.smooth)
        if spec.gamma == 1:
            return missing
        # Rounding may leave a perfect overlap just below 0, where a power is NaN; at 0 its slope is infinite.
        return torch.where(missing > NOTHING, missing.clamp(min=NOTHING) ** spec.gamma, 0.0)

    return _overlap("tversky", spec, labels, losses)


def _overlap(name: str, spec: Overlap, labels: Labels, losses: AreaLosses) -> Term:
    if labels.task != "segmentation":
        raise refused(
            f"loss.{name}: compares areas, and {labels.task} has no masks",
            mend=f"use {'bce' if labels.task == 'multilabel' else 'cross_entropy'} or focal instead",
        )
    # One output speaks of class 1 alone.
    first = 1 if spec.foreground or labels.outputs == 1 else 0

    def sums(outputs_BCHW: torch.Tensor, targets_BHW: torch.Tensor, weights_B: torch.Tensor) -> torch.Tensor:
        counting = labels.counting(targets_BHW, weights_B)
        shares_B1HW = torch.where(counting, along(weights_B, targets_BHW), 0.0).unsqueeze(1)
        logits_BCHW = visible(outputs_BCHW, counting)
        if labels.outputs == 1:
            probabilities_BKHW = logits_BCHW.sigmoid()
        else:
            probabilities_BKHW = logits_BCHW.softmax(dim=1)[:, first:]
        taken_K = torch.arange(first, labels.classes, device=targets_BHW.device)
        is_true_BKHW = targets_BHW.unsqueeze(1) == taken_K.view(1, -1, 1, 1)
        predicted_BKHW = probabilities_BKHW * shares_B1HW
        maps = (
            torch.where(is_true_BKHW, predicted_BKHW, 0.0),
            predicted_BKHW,
            torch.where(is_true_BKHW, shares_B1HW, 0.0),
        )
        return torch.cat([areas.sum(dim=(0, 2, 3)) for areas in maps])

    def value(sums: torch.Tensor) -> torch.Tensor:
        both_K, predicted_K, true_K = sums.view(3, -1)
        return losses(both_K, predicted_K, true_K).mean()

    return Term(3 * (labels.classes - first), sums, value)


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """Above / below; 1 where there is no area at all: nothing was there and nothing was found."""
    return torch.where(below > NOTHING, above / below.clamp(min=NOTHING), 1.0)
