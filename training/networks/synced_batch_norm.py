"""BatchNorm over the micro-batches of all processes together, on any device.

Its statistics are those of the *global* micro-batch, its gradient and running statistics those that a single
process would get from it. A layer adds up one small vector over the processes on its way forward and one on
its way back, in float64. Sources: Ioffe and Szegedy (ICML 2015); how variances of parts make that of the
whole: Chan, Golub and LeVeque (1983). Shapes: B samples, C channels; features are [B, C] or [B, C, ...].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# It has no public name; all of torch's kinds, also SyncBatchNorm, are made of it.
from torch.nn.modules.batchnorm import _BatchNorm

from data_pipeline.fault import UserError


@dataclass
class Presence:
    """Whether this process's part of the global micro-batch counts; layers look here at every forward pass.

    A micro-batch counts as a whole or, if it is made of stand-ins, not at all.
    """

    valid: torch.Tensor | None = None  # bool [B]; None: it counts


def synchronise(network: torch.nn.Module) -> Presence:
    """Let all BatchNorm of `network` share its statistics; what tells the layers which samples count.

    The layers stay the objects that they were, with their names, parameters, activations and hooks. CONFIG
    for one of a kind whose computation is not known here.
    """
    presence = Presence()
    for name, layer in network.named_modules():
        if not isinstance(layer, _BatchNorm):
            continue
        synced = SYNCED.get(type(layer))
        if synced is None:
            kind, known = type(layer).__name__, ", ".join(one.__name__ for one in SYNCED)
            raise UserError(
                f"train.sync_batchnorm: layer {name} is a {kind}, whose computation is not known",
                mend=f"leave the option out; what can be synchronised is {known}",
                code="CONFIG",
            )
        layer.__class__ = synced
        assert isinstance(layer, _Synced)
        layer.presence = presence
    return presence


class Moments(NamedTuple):
    """Of a channel's values in the whole global micro-batch."""

    mean: torch.Tensor  # float32 [C]
    variance: torch.Tensor  # float32 [C], divided by their number
    unbiased: torch.Tensor  # float32 [C], divided by one less
    part: torch.Tensor  # float32, what each of this process's values is of all; 0 where they do not count


class _Synced(_BatchNorm):
    """What the layers below have in common; with one process, or to evaluate, they are what they were."""

    presence: Presence

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """ValueError where a channel has a single value in the whole global micro-batch."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(features)
        self._check_input_dim(features)  # type: ignore[no-untyped-call]
        return self._activated(self._normalised(features))

    def _activated(self, normalised: torch.Tensor) -> torch.Tensor:
        return normalised

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _normalised(self, features: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            moments = _moments(features, self.presence.valid)
            self._advance(moments)
        # Those without parameters of their own are as if these were fixed.
        weight = torch.ones_like(moments.mean) if self.weight is None else self.weight
        bias = torch.zeros_like(moments.mean) if self.bias is None else self.bias
        normalised: torch.Tensor = _Normalise.apply(features, weight, bias, moments, self.eps)  # type: ignore[no-untyped-call]
        return normalised

    def _advance(self, moments: Moments) -> None:
        """Move the running statistics on as torch's own layers do."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(moments.mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(moments.unbiased.to(self.running_var.dtype), factor)


class SyncedBatchNorm1d(_Synced, torch.nn.BatchNorm1d):
    """Of features [B, C] or [B, C, L]."""


class SyncedBatchNorm2d(_Synced, torch.nn.BatchNorm2d):
    """Of features [B, C, H, W]."""


class SyncedBatchNorm3d(_Synced, torch.nn.BatchNorm3d):
    """Of features [B, C, D, H, W]."""


class SyncedBatchNormAct2d(_Synced, BatchNormAct2d):
    """Of features [B, C, H, W], with what timm's networks keep inside: dropout and activation."""

    def _activated(self, normalised: torch.Tensor) -> torch.Tensor:
        activated: torch.Tensor = self.act(self.drop(normalised))
        return activated


SYNCED: dict[type[torch.nn.Module], type[_Synced]] = {
    torch.nn.BatchNorm1d: SyncedBatchNorm1d,
    torch.nn.BatchNorm2d: SyncedBatchNorm2d,
    torch.nn.BatchNorm3d: SyncedBatchNorm3d,
    BatchNormAct2d: SyncedBatchNormAct2d,
}


class _Normalise(torch.autograd.Function):
    """(features - mean) / sqrt(variance + eps) * weight + bias, where mean and variance are the features'."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        features: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        moments: Moments,
        eps: float,
    ) -> torch.Tensor:
        mean, variance = moments.mean, moments.variance
        ctx.save_for_backward(features, weight, mean, variance, moments.part)
        ctx.eps = eps
        return F.batch_norm(features, mean, variance, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of features, weight and bias; those of the parameters are this process's part."""
        features, weight, mean, variance, part = ctx.saved_tensors
        fixed = (mean, variance, None, None, False, ctx.eps, [True, True, True])
        # As if mean and variance were fixed; what goes through them comes off below.
        of_features, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            slopes, features, weight, *fixed
        )
        if not ctx.needs_input_grad[0]:
            return None, of_weight, of_bias, None, None
        through_mean, through_variance = (_added_up(torch.stack([of_bias, of_weight])) * part).float()
        scale = weight * (variance + ctx.eps).rsqrt()
        of_statistics = F.batch_norm(
            features, mean, variance, scale * through_variance, scale * through_mean, eps=ctx.eps
        )
        return of_features - of_statistics, of_weight, of_bias, None, None


def _moments(features: torch.Tensor, valid: torch.Tensor | None) -> Moments:
    """Over all processes; each measures deviations from its own mean, so that rounding loses none."""
    along, channels = [0, *range(2, features.ndim)], features.shape[1]
    values = features.numel() // channels
    mean = features.mean(dim=along, dtype=torch.float32)
    deviations = features - mean.view(1, channels, *[1] * (features.ndim - 2))
    own_mean, own_variance = mean.double(), deviations.square_().sum(dim=along).double() / values
    one = torch.ones(1, dtype=torch.float64, device=features.device)
    own = torch.cat([one, own_mean, own_variance + own_mean.square()]) * values
    if valid is not None:
        own = torch.where(valid[0], own, 0.0)
    count, sums, squares = torch.split(_added_up(own), [1, channels, channels])
    # Only here may there be one value, and only here does the answer cost a GPU a halt.
    if values == 1 and count.item() == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got {list(features.shape)}")
    part = 1 / count
    if valid is not None:
        part = torch.where(valid[0], part, 0.0)
    mean = sums / count
    variance = (squares / count - mean.square()).clamp(min=0)
    unbiased = variance * count / (count - 1).clamp(min=1)
    return Moments(mean.float(), variance.float(), unbiased.float(), part)


def _added_up(own: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, float64; every process comes here."""
    total = own.double()
    dist.all_reduce(total)
    return total
