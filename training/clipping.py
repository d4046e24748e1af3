"""Keeps a gradient within limits: of its norm, of its values, or of each unit's share of its weights."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from accelerate import Accelerator
from timm.utils.agc import adaptive_clip_grad
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from training.config.optim import OptimConfig


def clip_gradients(
    accelerator: Accelerator,
    parameters: list[torch.nn.Parameter],
    config: OptimConfig,
    *,
    head: Collection[torch.nn.Parameter],
) -> bool:
    """Clip the gradients of a step in place, as the configuration says; those without one are left out.

    Whether they are finite, and their norm within float32's range too. Where they are not, nothing is clipped
    and no step may be taken: a limit of values would hide what is infinite, one of the norm would spread it.
    Adaptive clipping spares the `head`, as its authors do. Source: Brock et al. (ICML 2021).
    """
    accelerator.unscale_gradients()
    norm = get_total_norm([one.grad for one in parameters if one.grad is not None])
    # The one number that is read in a step. On a GPU the program waits here for the backward pass, and then
    # has only the optimizer's few kernels to launch before it runs ahead again: batches are read in other
    # threads meanwhile. To decide without waiting, each update rule would have to look at a flag of its own
    # on the device, and most have none.
    if not math.isfinite(float(norm)):
        return False
    if config.clip_norm is not None:
        clip_grads_with_norm_(parameters, config.clip_norm, norm)
    elif config.clip_value is not None:
        torch.nn.utils.clip_grad_value_(parameters, config.clip_value)
    elif config.clip_adaptive is not None:
        spared = {id(parameter) for parameter in head}
        body = [parameter for parameter in parameters if id(parameter) not in spared]
        adaptive_clip_grad(body, clip_factor=config.clip_adaptive)  # type: ignore[no-untyped-call]
    return True
