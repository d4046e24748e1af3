"""Keeps a gradient within limits: of its norm, of its values, or of each unit's share of its weights."""

from __future__ import annotations

from collections.abc import Collection

import torch
from accelerate import Accelerator
from timm.utils.agc import adaptive_clip_grad

from training.config.optim import OptimConfig


def clip_gradients(
    accelerator: Accelerator,
    parameters: list[torch.nn.Parameter],
    config: OptimConfig,
    *,
    head: Collection[torch.nn.Parameter],
) -> None:
    """Clip the gradients of a step in place, as the configuration says; those without one are left out.

    Adaptive clipping spares the `head`, as its authors do. Source: Brock et al. (ICML 2021).
    """
    if config.clip_norm is not None:
        accelerator.clip_grad_norm_(parameters, config.clip_norm)
    elif config.clip_value is not None:
        accelerator.clip_grad_value_(parameters, config.clip_value)
    elif config.clip_adaptive is not None:
        accelerator.unscale_gradients()
        spared = {id(parameter) for parameter in head}
        body = [parameter for parameter in parameters if id(parameter) not in spared]
        adaptive_clip_grad(body, clip_factor=config.clip_adaptive)  # type: ignore[no-untyped-call]
