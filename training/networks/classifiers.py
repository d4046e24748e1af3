"""Classification networks, by timm's names."""

from __future__ import annotations

import difflib

import torch

from data_pipeline.fault import UserError, first_line
from data_pipeline.torchvision_cpu import declare_missing_operators

declare_missing_operators()  # for a checkout that runs without being installed: timm imports torchvision
import timm  # noqa: E402


def classifier(name: str, *, channels: int, outputs: int, pretrained: bool) -> torch.nn.Module:
    """The timm network `name` for `channels` channels, with a head of `outputs` classes; else CONFIG."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise UserError(
            f"model.name: timm has no network {name!r}" + (f" (did you mean {close[0]}?)" if close else ""),
            mend='python -c "import timm; print(*timm.list_models())" lists them',
            code="CONFIG",
        )
    try:
        network = timm.create_model(name, in_chans=channels, num_classes=outputs, pretrained=pretrained)
    except Exception as error:
        if not pretrained:
            raise
        raise UserError(
            f"model.pretrained: cannot get the weights of {name!r}: {first_line(error)}",
            mend="connect to the hub once, so that the weights are cached, or set --model.pretrained false",
            code="CONFIG",
        ) from error
    assert isinstance(network, torch.nn.Module)
    return network
