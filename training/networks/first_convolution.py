"""The convolution that sees the picture: found, rebuilt for other channels, its weights carried over.

Shapes: O filters, C channels of the picture, K the kernel's side.
"""

from __future__ import annotations

import torch

from training.networks.catalogue import timm


def first_convolution(network: torch.nn.Module) -> str | None:
    """Dotted name of the first convolution in the order of definition; None without one."""
    name: str
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            return name
    return None


def replace_first_convolution(network: torch.nn.Module, *, channels: int) -> None:
    """Put a convolution for `channels` channels in its place, drawn as torch draws convolutions."""
    name = first_convolution(network)
    assert name is not None, "every classifier of torchvision begins with a convolution"
    old = network.get_submodule(name)
    assert isinstance(old, torch.nn.Conv2d), name
    new = torch.nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        old.groups,
        old.bias is not None,
        old.padding_mode,
    )
    network.set_submodule(name, new)


def adapted(weight_OCKK: torch.Tensor, *, channels: int) -> torch.Tensor | None:
    """The filters for pictures with another number of channels; None where there is no way.

    Colour to grey: the sum over the channels. Colour to n: the channels repeated in turn, times 3/n (timm).
    Grey to n: the same filter for each, divided by n, so that a grey picture gives what it gave.
    """
    if weight_OCKK.ndim != 4:
        return None
    known = weight_OCKK.shape[1]
    if known == 1:
        return weight_OCKK.repeat(1, channels, 1, 1) / channels
    if known != 3:
        return None
    carried = timm.models.adapt_input_conv(channels, weight_OCKK)
    assert isinstance(carried, torch.Tensor)
    return carried
