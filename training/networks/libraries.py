"""One builder a library: from what the configuration says to a network with random weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from data_pipeline.fault import UserError
from training.networks.catalogue import (
    encoder_names,
    smp,
    smp_names,
    timm,
    torchvision,
    torchvision_names,
    unknown_encoder,
    unknown_network,
)
from training.networks.first_convolution import replace_first_convolution
from training.networks.mlp import mlp
from training.networks.sizes import refuse_other_sizes, take_any_size
from training.networks.spec import HUBS, NetworkSpec
from training.networks.unet import UNet
from training.plugins import load_plugin

# These two give a tuple in training unless they are built without their auxiliary heads.
ONE_OUTPUT = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def timm_network(spec: NetworkSpec) -> torch.nn.Module:
    """A classifier of timm's, or one that timm finds on a hub (hf-hub:OWNER/NAME)."""
    on_hub = spec.name.lower().startswith(HUBS)
    if not on_hub and (any(mark in spec.name for mark in "/\\:") or not timm.is_model(spec.name)):
        raise unknown_network(spec)
    network: torch.nn.Module = timm.create_model(
        spec.name, in_chans=spec.channels, num_classes=spec.outputs, **spec.arguments
    )
    about: Any = network.pretrained_cfg
    flexible = spec.arguments.get("dynamic_img_size") or not spec.arguments.get("strict_img_size", True)
    if about.get("fixed_input_size") and not flexible:
        size = spec.arguments.get("img_size") or about["input_size"][-2:]
        height, width = (size, size) if isinstance(size, int) else size
        refuse_other_sizes(network, name=spec.written, height=height, width=width, option="img_size")
    return network


def torchvision_network(spec: NetworkSpec) -> torch.nn.Module:
    """A classifier of torchvision's; for pictures that are not RGB its first convolution is made anew."""
    if spec.name not in torchvision_names():
        raise unknown_network(spec)
    arguments = {**ONE_OUTPUT.get(spec.name, {}), **spec.arguments}
    network: torch.nn.Module = torchvision.models.get_model(
        spec.name, weights=None, num_classes=spec.outputs, **arguments
    )
    if spec.channels != 3:
        replace_first_convolution(network, channels=spec.channels)
    if isinstance(network, torchvision.models.VisionTransformer):
        side = network.image_size
        refuse_other_sizes(network, name=spec.written, height=side, width=side, option="image_size")
    return network


def smp_network(spec: NetworkSpec) -> torch.nn.Module:
    """A segmentation network of segmentation_models_pytorch, for pictures of any size."""
    if spec.name.lower() not in map(str.lower, smp_names()):
        raise unknown_network(spec)
    encoder = str(spec.arguments.get("encoder_name", "resnet34"))
    if (encoder.partition(".")[0] if encoder.startswith("tu-") else encoder) not in encoder_names():
        raise unknown_encoder(encoder)
    known = inspect.signature(smp.MODEL_ARCHITECTURES_MAPPING[spec.name.lower()]).parameters
    strange = sorted(spec.arguments.keys() - known.keys())
    if strange and not encoder.startswith("tu-"):  # then they are for timm; else they would be ignored
        raise TypeError(f"{spec.name} has no argument {', '.join(strange)}; it has {', '.join(known)}")
    network: torch.nn.Module = smp.create_model(
        spec.name, encoder_weights=None, in_channels=spec.channels, classes=spec.outputs, **spec.arguments
    )
    if network.requires_divisible_input_shape:
        stride = network.encoder.output_stride  # type: ignore[union-attr]
        assert isinstance(stride, int), stride
        take_any_size(network, multiple=stride)
    return network


def plain_unet(spec: NetworkSpec) -> torch.nn.Module:
    """Our own UNet."""
    return UNet(spec.channels, spec.outputs, **spec.arguments)


def plain_mlp(spec: NetworkSpec) -> torch.nn.Module:
    """Our own perceptron."""
    return mlp(spec.channels, spec.outputs, **spec.arguments)


def own_network(spec: NetworkSpec) -> torch.nn.Module:
    """What the user's `module:name` gives when it is called with channels, outputs and the arguments."""
    make = load_plugin(spec.name, option="--model.name")
    network = make(channels=spec.channels, outputs=spec.outputs, **spec.arguments)
    if not isinstance(network, torch.nn.Module):
        raise UserError(
            f"model.name: {spec.name!r} gives a {type(network).__name__}, not a torch.nn.Module",
            mend="name a class or function that is called with channels=, outputs= and gives the network",
            code="CONFIG",
        )
    return network


BUILDERS: dict[str, Callable[[NetworkSpec], torch.nn.Module]] = {
    "timm": timm_network,
    "torchvision": torchvision_network,
    "segmentation_models_pytorch": smp_network,
    "unet": plain_unet,
    "mlp": plain_mlp,
    "own": own_network,
}
