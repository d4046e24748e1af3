"""Losses of single elements: cross-entropy, its yes-or-no form, and both fading out for what is easy.

Shapes: B samples, C classes or labels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from training.config.loss import Bce, CrossEntropy, Focal, Weights
from training.losses.elements import Labels, constant, mean_over_elements, refused
from training.objective import Term

# Beyond this logit 1 - sigmoid is 0 in float32, and the derivative of its power below 1 infinite.
CERTAIN = 16.0


def cross_entropy(spec: CrossEntropy, labels: Labels) -> Term:
    """Negative log-likelihood of the softmax in nats, as torch's: the mean is weighted where classes are."""
    if labels.yes_or_no:
        raise refused(
            f"loss.cross_entropy: tells one class from the others, {_asked(labels)}",
            mend="use bce or focal instead",
        )
    option = "loss.cross_entropy.class_weights"
    total = sum(labels.positives)
    balanced = {number: _quotient(total, labels.classes * n) for number, n in enumerate(labels.positives)}
    weights = _weights(spec.class_weights, option, balanced)
    class_weights = None if weights is None else constant(weights)

    def losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            logits,
            targets.long(),
            weight=class_weights(logits.device) if class_weights else None,
            label_smoothing=spec.label_smoothing,
            reduction="none",
        )

    return mean_over_elements(labels, losses, class_weights)


def bce(spec: Bce, labels: Labels) -> Term:
    """Binary cross-entropy of logits in nats; smoothing s turns 1 into 1 - s/2 and 0 into s/2."""
    if not labels.yes_or_no:
        raise refused(
            f"loss.bce: answers yes-or-no questions, {_asked(labels)}",
            mend="use cross_entropy or focal instead",
        )
    # One output speaks of class 1 alone.
    asked = (1,) if labels.task == "segmentation" else range(labels.classes)
    balanced = {number: _quotient(labels.negatives[number], labels.positives[number]) for number in asked}
    weights = _weights(spec.pos_weight, "loss.bce.pos_weight", balanced)
    pos_weight = None if weights is None else constant(weights)

    def losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        certain = targets.float()
        return F.binary_cross_entropy_with_logits(
            _logits(outputs, labels),
            certain * (1 - spec.label_smoothing) + spec.label_smoothing / 2,
            pos_weight=pos_weight(outputs.device) if pos_weight else None,
            reduction="none",
        )

    return mean_over_elements(labels, losses)


def focal(spec: Focal, labels: Labels) -> Term:
    """(1 - p)^gamma times the cross-entropy, p being the probability of what is true.

    The mean is over all elements, not over the positives alone. Source: Lin et al. (ICCV 2017).
    """
    if spec.alpha is not None and not labels.yes_or_no:
        raise refused(
            f"loss.focal.alpha: {spec.alpha} weighs yes against no, {_asked(labels)}",
            mend="leave loss.focal.alpha out; cross_entropy has class_weights",
        )

    def of_classes(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        each = F.cross_entropy(logits, targets.long(), reduction="none")
        others = -torch.expm1(-each)
        return each * others.clamp(min=torch.finfo(others.dtype).tiny) ** spec.gamma

    def of_answers(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = _logits(outputs, labels)
        if 0 < spec.gamma < 1:
            logits = torch.where(targets > 0, logits.clamp(max=CERTAIN), logits.clamp(min=-CERTAIN))
        alpha = -1.0 if spec.alpha is None else spec.alpha
        found: torch.Tensor = sigmoid_focal_loss(logits, targets.float(), alpha=alpha, gamma=spec.gamma)
        return found

    return mean_over_elements(labels, of_answers if labels.yes_or_no else of_classes)


def _logits(outputs: torch.Tensor, labels: Labels) -> torch.Tensor:
    """One logit for each target."""
    return outputs.squeeze(1) if labels.task == "segmentation" else outputs


def _weights(
    written: Weights | None, option: str, balanced: dict[int, float | None]
) -> tuple[float, ...] | None:
    """The weights as written, or those that balance the classes; CONFIG where one of them cannot be."""
    if written is None:
        return None
    name = option.rpartition(".")[2]
    if written != "auto":
        if len(written) != len(balanced):
            raise refused(
                f"{option}: {len(written)} numbers, there must be {len(balanced)}",
                mend=f"give {name} one number for each of the classes {_listed(balanced)}, or auto",
            )
        return written
    lacking = [number for number, weight in balanced.items() if weight is None]
    if lacking:
        raise refused(
            f"{option}: auto has nothing to weigh class {_listed(lacking)} by: the training split "
            "has no example of it, or no counter-example",
            mend=f"give {name} as {len(balanced)} numbers, for the classes {_listed(balanced)}",
        )
    return tuple(weight for weight in balanced.values() if weight is not None)


def _quotient(above: int, below: int) -> float | None:
    """None also for 0: a class of that weight would never be learned."""
    return above / below if above and below else None


def _listed(numbers: Iterable[int]) -> str:
    """Class numbers, shortened: there may be a thousand."""
    words = [str(number) for number in numbers]
    return ", ".join(words if len(words) <= 10 else [*words[:4], "...", words[-1]])


def _asked(labels: Labels) -> str:
    """What the task asks for, as the end of a sentence."""
    if labels.task == "multilabel":
        return "and here a picture may have several labels"
    if labels.task == "multiclass":
        return "and here a picture has one of several classes"
    if labels.outputs == 1:
        return "and beside bce the network has one output for the two classes of pixels"
    return f"and here the network has an output for each of {labels.classes} classes of pixels"
