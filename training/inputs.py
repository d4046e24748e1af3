"""From bytes on the host to what the model gets: uint8 crosses to the device, and is normalised there.

Shapes: B samples, C channels, H W pixels, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from data_pipeline.batch import Batch
from data_pipeline.fault import UserError
from data_pipeline.index import DatasetIndex
from training.config import Config


class Inputs(NamedTuple):
    """A batch on the device."""

    images: torch.Tensor  # float32 [B, C, H, W], normalised
    targets: torch.Tensor  # int64 [B], int8 [B, L] or uint8 [B, H, W]
    valid: torch.Tensor  # bool [B]
    weights: torch.Tensor  # float32 [B], 1 where `valid`, else 0
    share: torch.Tensor  # float32 [B], what a mixed sample is of itself; 1 where nothing is mixed
    partner_targets: torch.Tensor | None  # as `targets`, of what the rest is; None: nothing is mixed


class Normalizer:
    """Subtracts the mean and divides by the deviation of pixels in 0..1, per channel, on the device.

    Two separately rounded operations, not one fused: the pixels are then the same bits on every device and
    for every size of a micro-batch. With `channels_last` they lie in memory as they came, which is what
    convolutions in that layout want.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        *,
        channels_last: bool = False,
    ) -> None:
        self._device = device
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._mean = (torch.tensor(mean, device=device) * 255).view(1, -1, 1, 1)
        self._std = (torch.tensor(std, device=device) * 255).view(1, -1, 1, 1)

    def __call__(self, batch: Batch) -> Inputs:
        """Move without blocking and normalise."""
        return self.normalised(self.moved(batch))

    def kept(self, batch: Batch) -> Inputs:
        """`moved`, and still there when the next batch has taken its buffer."""
        inputs = self.moved(batch)
        if self._device.type == "cuda":
            return inputs
        return inputs._replace(images=inputs.images.clone(), targets=inputs.targets.clone())

    def moved(self, batch: Batch) -> Inputs:
        """The batch on the device, its images still uint8 [B, H, W, C]: a quarter of the memory."""
        images, targets, valid = (self._moved(one) for one in (batch.images, batch.targets, batch.valid))
        weights = valid.float()
        if batch.mixed is None:
            return Inputs(images, targets, valid, weights, torch.ones_like(weights), None)
        mixed = batch.mixed
        return Inputs(images, targets, valid, weights, self._moved(mixed.share), self._moved(mixed.targets))

    def normalised(self, inputs: Inputs) -> Inputs:
        """What the model gets of `moved` inputs."""
        images = inputs.images.permute(0, 3, 1, 2).float().contiguous(memory_format=self._layout)
        return inputs._replace(images=images.sub_(self._mean).div_(self._std))

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True)


def pixel_statistics(config: Config, dataset: DatasetIndex) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel that a run normalises with; CONFIG where their number is wrong."""
    for name in ("mean", "std"):
        given = getattr(config.data, name)
        if given is not None and len(given) != dataset.channels:
            raise UserError(
                f"data.{name}: {len(given)} values, the pictures have {dataset.channels} "
                f"channel{'s' * (dataset.channels > 1)}",
                mend="give a value for each channel, or none for the training split's own",
                code="CONFIG",
            )
    return config.data.mean or dataset.mean, config.data.std or dataset.std


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
