"""Pictures whose size a network does not take: padded and cropped where that is possible, refused elsewhere.

Both are hooks, so that the names of the parameters stay those of the bare network.
Shapes: B samples, C channels, O outputs, H W pixels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from data_pipeline.fault import UserError

Arguments = tuple[torch.Tensor, ...]


class AnySize:
    """Two hooks that share the size of the picture in hand: edges are repeated before, cut off after."""

    def __init__(self, multiple: int) -> None:
        self.multiple = multiple
        self.height, self.width = 0, 0

    def pad(self, _: torch.nn.Module, args: Arguments) -> Arguments:
        """[B, C, H, W] -> H and W rounded up to the multiple."""
        images_BCHW, *others = args
        self.height, self.width = images_BCHW.shape[-2:]
        below, right = -self.height % self.multiple, -self.width % self.multiple
        if below or right:
            images_BCHW = F.pad(images_BCHW, (0, right, 0, below), mode="replicate")
        return (images_BCHW, *others)

    def crop(self, _: torch.nn.Module, args: Arguments, logits_BOHW: torch.Tensor) -> torch.Tensor:
        """[B, O, ...] -> [B, O, H, W] of the picture that came in."""
        return logits_BOHW[..., : self.height, : self.width]


def take_any_size(network: torch.nn.Module, *, multiple: int) -> None:
    """Let a network that needs sizes divisible by `multiple` take any."""
    any_size = AnySize(multiple)
    network.register_forward_pre_hook(any_size.pad)
    network.register_forward_hook(any_size.crop)


def refuse_other_sizes(network: torch.nn.Module, *, name: str, height: int, width: int, option: str) -> None:
    """Say in the user's words, CONFIG, that `network` takes pictures of one size only."""
    network.register_forward_pre_hook(
        partial(_check_size, name=name, height=height, width=width, option=option)
    )


def _check_size(
    _: torch.nn.Module, args: Arguments, *, name: str, height: int, width: int, option: str
) -> None:
    here = tuple(args[0].shape[-2:])
    if here != (height, width):
        raise UserError(
            f"model.name: {name!r} was built for pictures of {height}x{width} pixels (height x width), "
            f"these have {here[0]}x{here[1]}",
            mend=f"set {option} in model.arguments to the pictures' size, "
            "or resize them in data.train_transforms and data.eval_transforms",
            code="CONFIG",
        )
