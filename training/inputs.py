"""From bytes on the host to what the model gets: uint8 crosses to the device, and is normalised there.

Shapes: B samples, C channels, H W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from data_pipeline.batch import Batch
from data_pipeline.fault import UserError
from data_pipeline.index import DatasetIndex


class Inputs(NamedTuple):
    """A batch on the device."""

    images: torch.Tensor  # float32 [B, C, H, W], normalised
    targets: torch.Tensor  # int64 [B]
    valid: torch.Tensor  # bool [B]
    weights: torch.Tensor  # float32 [B], 1 where `valid`, else 0
    share: torch.Tensor  # float32 [B], what a mixed sample is of itself; 1 where nothing is mixed
    partner_targets: torch.Tensor | None  # as `targets`, of what the rest is; None: nothing is mixed


class Normalizer:
    """Subtracts the data set's mean and divides by its deviation, per channel, on the device.

    Two separately rounded operations, not one fused: the pixels are then the same bits on every device and
    for every size of a micro-batch.
    """

    def __init__(self, dataset: DatasetIndex, device: torch.device) -> None:
        self._device = device
        self._mean = (torch.tensor(dataset.mean, device=device) * 255).view(1, -1, 1, 1)
        self._std = (torch.tensor(dataset.std, device=device) * 255).view(1, -1, 1, 1)

    def __call__(self, batch: Batch) -> Inputs:
        """Move without blocking and normalise."""
        images = self._moved(batch.images).permute(0, 3, 1, 2)
        images = images.float().contiguous().sub_(self._mean).div_(self._std)
        targets, valid = self._moved(batch.targets), self._moved(batch.valid)
        weights = valid.float()
        if batch.mixed is None:
            return Inputs(images, targets, valid, weights, torch.ones_like(weights), None)
        mixed = batch.mixed
        return Inputs(images, targets, valid, weights, self._moved(mixed.share), self._moved(mixed.targets))

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True)


def forward(model: torch.nn.Module, images_BCHW: torch.Tensor) -> torch.Tensor:
    """The model's outputs in training; CONFIG where BatchNorm is left alone with a single value."""
    try:
        outputs: torch.Tensor = model(images_BCHW)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"train: BatchNorm cannot learn from a forward pass of {len(images_BCHW)} sample: {error}",
            mend="raise --train.micro-batch or --train.global-batch, or start fewer processes",
            code="CONFIG",
        ) from None
    return outputs
