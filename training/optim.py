"""How weights change: update rules, which parameters decay, and the rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from training.config import OptimConfig

Groups = list[dict[str, object]]


def sgd(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    """Nesterov momentum; weight decay is added to the gradient."""
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def adamw(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay. Source: Loshchilov and Hutter (ICLR 2019)."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999))


OPTIMIZERS: dict[str, Callable[[Groups, OptimConfig], torch.optim.Optimizer]] = {"sgd": sgd, "adamw": adamw}


def build_optimizer(network: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of all trainable parameters; biases and norms (one dimension or none) do not decay."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    decaying = [parameter for parameter in trainable if parameter.ndim > 1]
    others = [parameter for parameter in trainable if parameter.ndim <= 1]
    groups: Groups = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return OPTIMIZERS[config.name]([group for group in groups if group["params"]], config)


def rate_at(step: int, config: OptimConfig, *, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`.

    Linear warm-up to `lr`, then constant, or half a cosine to `final_lr` (Loshchilov and Hutter, SGDR, 2017).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.final_lr + (config.lr - config.final_lr) * (1 + math.cos(math.pi * done)) / 2
