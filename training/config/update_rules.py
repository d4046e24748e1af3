"""What the update rules that a recipe may name can be told beside the options that they share."""

from __future__ import annotations

from typing import Literal

from training.config.tree import Section

Betas = tuple[float, float]


class Sgd(Section):
    """Steps along the gradient, with momentum. Source: Sutskever et al. (ICML 2013)."""

    nesterov: bool = True
    """look ahead; off where optim.momentum is 0"""
    dampening: float = 0.0
    """share of the gradient that momentum leaves out"""


class Adam(Section):
    """A rate for each number by its gradients' size. Source: Kingma and Ba (ICLR 2015)."""

    betas: Betas = (0.9, 0.999)
    """decay of the first and second moment; the first is optim.momentum"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    amsgrad: bool = False
    """second moments never shrink"""


class AdamW(Adam):
    """Adam with decoupled weight decay. Source: Loshchilov and Hutter (ICLR 2019)."""


class RmsProp(Section):
    """The gradient by its root mean square. Source: Tieleman and Hinton, lecture 6.5 (2012)."""

    alpha: float = 0.99
    """decay of the mean square"""
    eps: float = 1e-8
    """added to its root"""
    centered: bool = False
    """variance instead of the mean square"""


class NAdam(Section):
    """Adam with Nesterov's momentum. Source: Dozat (ICLR 2016 workshop)."""

    betas: Betas = (0.9, 0.999)
    """decay of the first and second moment; the first is optim.momentum"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    momentum_decay: float = 0.004
    """how fast momentum grows to its end"""


class Lamb(Section):
    """Adam with a rate for each tensor by its norm, for large batches. Source: You et al. (ICLR 2020)."""

    betas: Betas = (0.9, 0.999)
    """decay of the first and second moment; the first is optim.momentum"""
    eps: float = 1e-6
    """added to the root of the second moment"""
    trust_clip: bool = False
    """a tensor's rate is at most optim.lr"""
    always_adapt: bool = False
    """also for what does not decay"""


class Lion(Section):
    """The sign of a momentum; wants a tenth of Adam's rate. Source: Chen et al. (NeurIPS 2023)."""

    betas: Betas = (0.9, 0.99)
    """share of the momentum in a step, and its decay; the first is optim.momentum"""
    caution: bool = False
    """leave out what points against the gradient"""


class Muon(Section):
    """Orthogonalised momentum for hidden matrices, AdamW for all else. Source: Jordan et al. (2024)."""

    nesterov: bool = False
    """look ahead"""
    ns_steps: int = 5
    """Newton-Schulz iterations"""
    conv_mode: Literal["flatten", "batched"] = "flatten"
    """a convolution is one matrix, or one for each pixel of its kernel"""
    adjust_lr_fn: Literal["original", "match_rms_adamw", "rms_to_rms"] = "match_rms_adamw"
    """a matrix's rate by its shape"""
    fallback_lr_scale: float = 1.0
    """rate of what AdamW takes, as a share of optim.lr"""
    betas: Betas = (0.9, 0.95)
    """of AdamW: decay of the first and second moment"""


class UpdateRules(Section):
    """Every update rule by its name in a recipe."""

    sgd: Sgd | None = None
    adam: Adam | None = None
    adamw: AdamW | None = None
    rmsprop: RmsProp | None = None
    nadam: NAdam | None = None
    lamb: Lamb | None = None
    lion: Lion | None = None
    muon: Muon | None = None
