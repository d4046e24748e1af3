"""What a network says of a batch of pictures, averaged over the mirror images that are asked for.

Shapes: B samples, C channels, O outputs, H W pixels. Outputs are [B, O], or [B, O, H, W] where pixels are
classified: those of a mirror image are mirrored back.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator

from data_pipeline.fault import UserError, first_line
from training.tasks.task import Task

COLUMNS, ROWS = -1, -2
VIEWS: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "horizontal": ((), (COLUMNS,)),
    "flips": ((), (COLUMNS,), (ROWS,), (ROWS, COLUMNS)),
}


class Answers(NamedTuple):
    """What is said of a batch; all of the shape of the network's outputs, float32."""

    scores: torch.Tensor  # probabilities or logits, as asked for
    probabilities: torch.Tensor
    ranking: torch.Tensor  # the finest there is to decide by: of large logits the probabilities are all 1
    even: float  # where in `ranking` a probability of one half lies


class Asked(NamedTuple):
    """How a network is asked: over which of VIEWS, and whether probabilities or logits are averaged."""

    views: str = "none"
    scores: Literal["probabilities", "logits"] = "probabilities"


def ask(
    network: torch.nn.Module, task: Task, images_BCHW: torch.Tensor, accelerator: Accelerator, asked: Asked
) -> Answers:
    """What the network says of normalised images; DATA where it takes no pictures of their size."""
    logits = [_seen(network, images_BCHW, mirrored, accelerator) for mirrored in VIEWS[asked.views]]
    if len(logits) > 1 and asked.scores == "probabilities":
        mean = torch.stack([task.probabilities(one).float() for one in logits]).mean(dim=0)
        return Answers(mean, mean, mean, 0.5)
    mean = torch.stack(logits).mean(dim=0) if len(logits) > 1 else logits[0]
    probabilities = task.probabilities(mean).float()
    return Answers(mean if asked.scores == "logits" else probabilities, probabilities, mean, 0.0)


def _seen(
    network: torch.nn.Module, images: torch.Tensor, mirrored: tuple[int, ...], accelerator: Accelerator
) -> torch.Tensor:
    try:
        with accelerator.autocast():
            outputs: torch.Tensor = network(images.flip(mirrored) if mirrored else images)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    # Each library has its own way to refuse a size.
    except (RuntimeError, ValueError, AssertionError) as error:
        height, width = images.shape[-2:]
        raise UserError(
            f"the network takes no pictures of {height} x {width} pixels: {first_line(error)}",
            mend="give pictures of the size of training, or train with --data.eval-transforms that fix one",
        ) from error
    outputs = outputs.float()
    return outputs.flip(mirrored) if mirrored and outputs.ndim == images.ndim else outputs
