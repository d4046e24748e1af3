"""From bytes on the host to what the model gets: uint8 crosses to the device, and is normalised there.

Shapes: B samples, C channels, H W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from data_pipeline.batch import Batch
from data_pipeline.index import DatasetIndex


class Inputs(NamedTuple):
    """A batch on the device."""

    images: torch.Tensor  # float32 [B, C, H, W], normalised
    targets: torch.Tensor  # int64 [B]
    valid: torch.Tensor  # bool [B]


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
        images = batch.images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        images = images.float().contiguous().sub_(self._mean).div_(self._std)
        targets = batch.targets.to(self._device, non_blocking=True)
        return Inputs(images, targets, batch.valid.to(self._device, non_blocking=True))
