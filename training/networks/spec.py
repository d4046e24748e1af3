"""Whose network a name means, and what it is built with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from data_pipeline.fault import UserError

HUBS = ("hf-hub:", "hf_hub:", "local-dir:")  # names of timm's that hold a colon
SEGMENTATION, CLASSIFICATION = {"segmentation"}, {"multiclass", "multilabel"}
TASKS_OF = {
    "timm": CLASSIFICATION,
    "torchvision": CLASSIFICATION,
    "mlp": CLASSIFICATION,
    "segmentation_models_pytorch": SEGMENTATION,
    "unet": SEGMENTATION,
    "own": SEGMENTATION | CLASSIFICATION,
}
# Arguments that the data set or another option decides.
RESERVED = {
    "timm": {
        *("num_classes", "in_chans", "features_only"),
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"),
    },
    "torchvision": {"num_classes", "weights", "weights_backbone", "progress"},
    "mlp": {"channels", "outputs"},
    "segmentation_models_pytorch": {"classes", "in_channels", "encoder_weights", "activation", "aux_params"},
    "unet": {"channels", "outputs"},
    "own": {"channels", "outputs"},
}


class NetworkSpec(NamedTuple):
    """What one network is built from."""

    written: str  # model.name
    library: str  # a key of TASKS_OF
    name: str  # as the library calls it
    channels: int  # of the pictures
    outputs: int  # classes, labels, or channels of a mask
    arguments: Mapping[str, Any]  # the user's own


def library_and_name(written: str) -> tuple[str, str]:
    """("torchvision", "resnet18") of "torchvision/resnet18"; a plain name is timm's."""
    for prefix, library in (
        ("torchvision/", "torchvision"),
        ("smp/", "segmentation_models_pytorch"),
        ("timm/", "timm"),
    ):
        if written.startswith(prefix):
            return library, written.removeprefix(prefix)
    if written in ("unet", "mlp"):
        return written, written
    foreign = ":" in written and not written.lower().startswith(HUBS)
    return ("own" if foreign else "timm"), written


def read_spec(
    name: str, *, task: str, channels: int, outputs: int, arguments: Mapping[str, Any]
) -> NetworkSpec:
    """The network that `name` means; CONFIG if it is not for `task` or an argument is decided elsewhere."""
    library, bare = library_and_name(name)
    if task not in TASKS_OF[library]:
        masks = task == "segmentation"
        raise UserError(
            f"model.name: {name!r} is no network for task {task}, "
            f"which needs {'an output for each pixel' if masks else 'one output a picture'}",
            mend="choose unet, smp/Unet or your own module:name"
            if masks
            else "choose a name of timm's, torchvision/NAME, mlp or your own module:name",
            code="CONFIG",
        )
    taken = sorted(RESERVED[library] & arguments.keys())
    if taken:
        raise UserError(
            f"model.arguments: {', '.join(taken)} cannot be set here",
            mend="leave it out: channels and outputs come from the data set, "
            "weights from --model.pretrained, and networks give logits",
            code="CONFIG",
        )
    return NetworkSpec(name, library, bare, channels, outputs, arguments)
