"""How a network computes, not what: activation checkpointing, memory layout, compilation."""

from __future__ import annotations

from typing import Any

import torch

from data_pipeline.fault import UserError
from training.config.model import ModelConfig
from training.networks.catalogue import smp


def apply_options(network: torch.nn.Module, config: ModelConfig) -> None:
    """Switch on, in place, what `config` asks for; names of parameters and the network's type stay.

    After SyncBatchNorm took the place of BatchNorm (it would leave hooks behind), before DDP.
    """
    if config.grad_checkpointing:
        checkpoint_activations(network, name=config.name)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        network.compile()


def checkpoint_activations(network: torch.nn.Module, *, name: str) -> None:
    """Let `network` compute its blocks twice instead of keeping what is inside them; CONFIG if it cannot.

    The gradients are the same. The second computation, on the way back, leaves the running statistics of
    BatchNorm alone, so those are the same too; torch by itself would advance them twice.
    """
    part: Any = network
    if isinstance(network, smp.base.SegmentationModel):
        part = network.encoder
        # The other encoders inherit switches from timm whose forward passes they replace.
        timms = isinstance(part, smp.encoders.TimmUniversalEncoder | smp.encoders.TimmViTEncoder)
        part = part.model if timms else None
    try:
        part.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # timm asserts where a network of its own has none
        raise UserError(
            f"model.grad_checkpointing: {name!r} has no activation checkpointing",
            mend="set --model.grad-checkpointing false; unet, most of timm's networks and smp networks with "
            "an encoder_name of tu-NAME have it",
            code="CONFIG",
        ) from error
    for module in network.modules():
        if getattr(module, "running_mean", None) is not None:
            once = StatisticsOnce()
            module.register_forward_pre_hook(once.lend)
            module.register_forward_hook(once.take_back, always_call=True)


class StatisticsOnce:
    """Two hooks of one normalisation: while a backward pass computes it again, it writes into copies."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def lend(self, module: torch.nn.Module, _: object) -> None:
        """Put copies in the place of the running statistics if a backward pass is under way."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return
        self.kept = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
        module._buffers.update({name: buffer.clone() for name, buffer in self.kept.items()})

    def take_back(self, module: torch.nn.Module, _: object, __: object) -> None:
        """Put the true ones back, also where torch breaks off because it has computed all it needs."""
        module._buffers.update(self.kept)
        self.kept = {}
