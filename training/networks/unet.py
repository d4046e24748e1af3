"""A plain UNet for pictures of any size.

Source: Ronneberger, Fischer and Brox, "U-Net" (MICCAI 2015), with padded convolutions, so that the output has
the input's size, and BatchNorm. Shapes: B samples, C channels, O outputs, H W pixels; level l has
width * 2**l channels and ceil(H / 2**l) x ceil(W / 2**l) pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch.utils.checkpoint import checkpoint


def _block(inputs: int, outputs: int, *, norm: bool) -> torch.nn.Sequential:
    """Twice: 3x3 convolution, BatchNorm unless `norm` is false, ReLU."""
    layers: list[torch.nn.Module] = []
    for channels in (inputs, outputs):
        layers.append(torch.nn.Conv2d(channels, outputs, 3, padding=1, bias=not norm))
        if norm:
            layers.append(torch.nn.BatchNorm2d(outputs))
        layers.append(torch.nn.ReLU())
    return torch.nn.Sequential(*layers)


def _transposed(inputs: int, outputs: int) -> torch.nn.Module:
    return torch.nn.ConvTranspose2d(inputs, outputs, 2, stride=2)


def _bilinear(inputs: int, outputs: int) -> torch.nn.Module:
    enlarge = torch.nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    return torch.nn.Sequential(enlarge, torch.nn.Conv2d(inputs, outputs, 1))


UPSAMPLING: dict[str, Callable[[int, int], torch.nn.Module]] = {
    "transposed": _transposed,
    "bilinear": _bilinear,
}


class UNet(torch.nn.Module):
    """`depth` halvings down, as many doublings up, each joined with the level of the same size."""

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        width: int = 64,
        depth: int = 4,
        norm: bool = True,
        upsampling: str = "transposed",
    ) -> None:
        """ValueError for a `width` or `depth` below 1 and an unknown `upsampling`."""
        if width < 1 or depth < 1:
            raise ValueError(f"width {width} and depth {depth} must be at least 1")
        if upsampling not in UPSAMPLING:
            raise ValueError(f"upsampling {upsampling!r} is unknown; there are {', '.join(UPSAMPLING)}")
        super().__init__()
        sizes = [width * 2**level for level in range(depth + 1)]
        pairs = list(pairwise(sizes))
        self.first = _block(channels, width, norm=norm)
        self.down = torch.nn.ModuleList(_block(upper, lower, norm=norm) for upper, lower in pairs)
        # A last odd row or column is halved too, so no size is too small.
        self.halve = torch.nn.MaxPool2d(2, ceil_mode=True)
        enlarge = UPSAMPLING[upsampling]
        self.enlarge = torch.nn.ModuleList(enlarge(lower, upper) for upper, lower in reversed(pairs))
        self.up = torch.nn.ModuleList(_block(2 * upper, upper, norm=norm) for upper, _ in reversed(pairs))
        self.head = torch.nn.Conv2d(width, outputs, 1)
        self.grad_checkpointing = False
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                # Gaussian with deviation sqrt(2 / inputs), as in the paper (section 3).
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what goes between the blocks, and compute the blocks again on the way back."""
        self.grad_checkpointing = enable

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, O, H, W]."""
        levels = [self._run(self.first, images_BCHW)]
        for block in self.down:
            levels.append(self._run(block, self.halve(levels[-1])))
        features = levels.pop()
        for enlarge, block in zip(self.enlarge, self.up, strict=True):
            beside = levels.pop()
            height, width = beside.shape[-2:]
            larger = enlarge(features)[..., :height, :width]
            features = self._run(block, torch.cat([beside, larger], dim=1))
        logits_BOHW: torch.Tensor = self.head(features)
        return logits_BOHW

    def _run(self, block: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing:
            again: torch.Tensor = checkpoint(block, features, use_reentrant=False)
            return again
        computed: torch.Tensor = block(features)
        return computed
