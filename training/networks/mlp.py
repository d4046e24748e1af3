"""A plain perceptron: every pixel an input, a few hidden layers.

Shapes: B samples, C channels, H W pixels, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.networks.sizes import refuse_other_sizes


class MLP(torch.nn.Module):
    """Flatten, then linear layers of `hidden` units, each with a ReLU and dropout, then a linear `head`."""

    def __init__(self, inputs: int, outputs: int, *, hidden: Sequence[int], dropout: float) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        for units in hidden:
            layers += [torch.nn.Linear(inputs, units), torch.nn.ReLU()]
            if dropout:
                layers.append(torch.nn.Dropout(dropout))
            inputs = units
        self.body = torch.nn.Sequential(*layers)
        self.head = torch.nn.Linear(inputs, outputs)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, O]."""
        logits: torch.Tensor = self.head(self.body(images_BCHW.flatten(1)))
        return logits


def mlp(
    channels: int,
    outputs: int,
    *,
    height: int,
    width: int,
    hidden: Sequence[int] = (512, 512),
    dropout: float = 0.0,
) -> MLP:
    """A perceptron for pictures of `height` x `width` pixels; one of another size is refused with CONFIG."""
    network = MLP(channels * height * width, outputs, hidden=hidden, dropout=dropout)
    refuse_other_sizes(network, name="mlp", height=height, width=width, option="height and width")
    return network
