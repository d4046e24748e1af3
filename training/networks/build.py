"""Networks by name: the network, which of its tensors are the head, and how model.json describes it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipeline.fault import UserError, first_line
from training.networks.libraries import BUILDERS, ONE_OUTPUT
from training.networks.outputs import expect_outputs
from training.networks.spec import HUBS, NetworkSpec, library_and_name, read_spec

OURS = ("unet", "mlp")


def build_network(
    name: str, *, task: str, channels: int, outputs: int, arguments: Mapping[str, Any]
) -> torch.nn.Module:
    """The network `name` for pictures [B, channels, H, W], with weights drawn from torch's global generator.

    It gives logits [B, outputs], for segmentation [B, outputs, H, W], and takes pictures of any size unless
    its architecture fixes one. CONFIG for a name or an argument that its library does not know, for a network
    of another task, and, in a forward pass, for one that gives something else.
    """
    spec = read_spec(name, task=task, channels=channels, outputs=outputs, arguments=arguments)
    network = _bare(spec)
    if spec.library != "segmentation_models_pytorch":  # hooks see pictures padded; it crops by construction
        expect_outputs(network, name=name, outputs=outputs, masks=task == "segmentation")
    return network


def head_names(
    name: str, *, task: str, channels: int, outputs: int, arguments: Mapping[str, Any]
) -> frozenset[str]:
    """Names of the tensors whose shape, or presence, depends on the number of outputs.

    Found by comparing with the same network for one output more, both without memory behind their tensors
    where the network can be built so. The global generator is left as it was.
    """
    spec = read_spec(name, task=task, channels=channels, outputs=outputs, arguments=arguments)
    before, after = _shapes(spec), _shapes(spec._replace(outputs=outputs + 1))
    return frozenset(one for one in before.keys() | after.keys() if before.get(one) != after.get(one))


def library_of(name: str, *, channels: int, outputs: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What model.json says about the network: whose it is, its name there, and what it is built with.

    `library` is timm, torchvision, segmentation_models_pytorch, lockstep (unet, mlp) or own.
    """
    library, bare = library_and_name(name)
    return {
        "library": "lockstep" if library in OURS else library,
        "name": bare,
        "arguments": {**(ONE_OUTPUT.get(bare, {}) if library == "torchvision" else {}), **arguments},
        "channels": channels,
        "outputs": outputs,
    }


def network_like(about: Mapping[str, Any], *, task: str, outputs: int) -> torch.nn.Module:
    """The network that `library_of` described, with random weights."""
    prefix = {"torchvision": "torchvision/", "segmentation_models_pytorch": "smp/"}.get(about["library"], "")
    return build_network(
        prefix + about["name"],
        task=task,
        channels=about["channels"],
        outputs=outputs,
        arguments=about.get("arguments", {}),
    )


def _bare(spec: NetworkSpec) -> torch.nn.Module:
    """The library's network; whatever the library says against it becomes CONFIG."""
    try:
        return BUILDERS[spec.library](spec)
    except UserError:
        raise
    except Exception as error:
        on_hub = spec.name.lower().startswith(HUBS)
        option = "model.arguments" if spec.arguments else "model.name"
        raise UserError(
            f"{option}: cannot build {spec.written!r} with arguments {dict(spec.arguments)}: "
            f"{type(error).__name__}: {first_line(error)}{_place(spec, error)}",
            mend="connect to the hub once, so that its description is cached"
            if on_hub
            else "correct --model.name or --model.arguments",
            code="CONFIG",
        ) from error


def _place(spec: NetworkSpec, error: Exception) -> str:
    """Where in the user's own file an error came up."""
    module = sys.modules.get(spec.name.partition(":")[0]) if spec.library == "own" else None
    frames = traceback.extract_tb(error.__traceback__)
    lines = [one.lineno for one in frames if module and one.filename == module.__file__]
    return f" ({Path(str(module.__file__)).name} line {lines[-1]})" if module and lines else ""


def _shapes(spec: NetworkSpec) -> dict[str, torch.Size]:
    # Some libraries draw numbers even then.
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                network = BUILDERS[spec.library](spec)
        except UserError:
            raise
        except Exception:
            # Some constructors look at values, which tensors on that device have not.
            network = _bare(spec)
    return {name: tensor.shape for name, tensor in network.state_dict().items() if torch.is_tensor(tensor)}
