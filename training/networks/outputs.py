"""Whether a network gives what its task needs; asked at each forward pass, because only then it shows.

Shapes: B samples, O outputs, H W pixels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from data_pipeline.fault import UserError


def expect_outputs(network: torch.nn.Module, *, name: str, outputs: int, masks: bool) -> None:
    """From now on raise CONFIG unless `network` gives [B, O], with `masks` [B, O, H, W] of the picture."""
    network.register_forward_hook(partial(_check, name=name, outputs=outputs, masks=masks))


def _check(
    _: torch.nn.Module, args: tuple[torch.Tensor, ...], given: Any, *, name: str, outputs: int, masks: bool
) -> None:
    if torch.compiler.is_compiling():
        return
    images = args[0]
    expected = [images.shape[0], outputs, *(images.shape[-2:] if masks else ())]
    found = list(given.shape) if isinstance(given, torch.Tensor) else f"a {type(given).__name__}"
    if found != expected:
        raise UserError(
            f"model.name: {name!r} gives {found} for pictures {list(images.shape)}; "
            f"this task and data set need a tensor {expected}",
            mend="give one tensor of logits, also in training: [samples, outputs]"
            + (", each of the picture's height and width" if masks else ""),
            code="CONFIG",
        )
