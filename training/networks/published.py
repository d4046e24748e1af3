"""Published weights of a network, as its own library gets them, from a hub or from that hub's cache."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from data_pipeline.fault import UserError, first_line
from training.networks.catalogue import smp, timm, torchvision
from training.networks.first_convolution import first_convolution
from training.networks.spec import HUBS, NetworkSpec

PATIENCE_SECONDS = 60.0  # torch's downloads would wait for ever on a network that swallows packets


class Published(NamedTuple):
    """Tensors under the library's names, where they are from, and what the library changed in them."""

    tensors: dict[str, torch.Tensor]
    origin: str
    adapted: tuple[str, ...] = ()


def published_weights(spec: NetworkSpec) -> Published:
    """The published weights, with the head they were published with; CONFIG if there are none to be had.

    The global generator is left as it was.
    """
    source = SOURCES.get(spec.library)
    if source is None:
        raise _none_for(
            spec, mend="set --model.pretrained false, or to a .safetensors or .pth file of your own"
        )
    try:
        with torch.random.fork_rng(devices=[]), _patience():
            return source(spec)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"model.pretrained: cannot get the weights of {spec.written!r}: {first_line(error)}",
            mend="connect to the hub once, so that the weights are cached, or set --model.pretrained "
            "to a file or to false",
            code="CONFIG",
        ) from error


def timm_weights(spec: NetworkSpec) -> Published:
    """From the Hugging Face hub, by timm, which also carries the first convolution to other channels."""
    on_hub = spec.name.lower().startswith(HUBS)
    if not on_hub and not timm.is_model_pretrained(spec.name):
        pattern = spec.name.partition(".")[0]
        raise _none_for(
            spec, mend=f'python -c "import timm; print(timm.list_pretrained({pattern!r}))" lists some'
        )
    network: Any = timm.create_model(spec.name, pretrained=True, in_chans=spec.channels, **spec.arguments)
    about = network.pretrained_cfg
    tag = "" if on_hub or "." in spec.name or not about.get("tag") else f".{about['tag']}"
    return Published(
        network.state_dict(), f"{spec.name}{tag} of timm", _adapted(network, about["input_size"][0], spec)
    )


def torchvision_weights(spec: NetworkSpec) -> Published:
    """From download.pytorch.org, by torchvision: the set that it recommends, for RGB."""
    weights = torchvision.models.get_model_weights(spec.name).DEFAULT
    # The constructor below reads the same cached file without this limit.
    weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    network = torchvision.models.get_model(spec.name, weights=weights, progress=False, **spec.arguments)
    return Published(network.state_dict(), f"{weights} of torchvision")


def smp_weights(spec: NetworkSpec) -> Published:
    """Of the encoder, trained on ImageNet, without `encoder.`, from the Hugging Face hub."""
    arguments = dict(spec.arguments)
    encoder = arguments.pop("encoder_name", "resnet34")
    network = smp.create_model(
        spec.name,
        encoder_name=encoder,
        encoder_weights=True if encoder.startswith("tu-") else "imagenet",
        in_channels=spec.channels,
        classes=spec.outputs,
        **arguments,
    )
    origin = f"encoder {encoder} of segmentation_models_pytorch"
    return Published(network.encoder.state_dict(), origin, _adapted(network, 3, spec))


SOURCES: dict[str, Callable[[NetworkSpec], Published]] = {
    "timm": timm_weights,
    "torchvision": torchvision_weights,
    "segmentation_models_pytorch": smp_weights,
}


def _adapted(network: torch.nn.Module, published: int, spec: NetworkSpec) -> tuple[str, ...]:
    if published == spec.channels:
        return ()
    name = f"{first_convolution(network)}.weight"
    return (f"{name}: for {published} channels at the hub, {spec.channels} here",)


def _none_for(spec: NetworkSpec, *, mend: str) -> UserError:
    return UserError(
        f"model.pretrained: there are no published weights of {spec.written!r}", mend=mend, code="CONFIG"
    )


@contextmanager
def _patience() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
