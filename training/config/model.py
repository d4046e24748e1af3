"""The network, as a recipe says it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator

from training.config.arguments import numbers_read
from training.config.durations import Duration
from training.config.tree import Section, free


class ModelConfig(Section):
    """The network."""

    name: str = Field(default="resnet10t", min_length=1)
    """timm's name; torchvision/NAME; smp/NAME for segmentation; unet, mlp; or your own as module:name"""
    arguments: Annotated[dict[str, Any], AfterValidator(numbers_read)] = Field(default_factory=dict)
    """further arguments of the network's constructor: {drop_path_rate: 0.1}, {encoder_name: resnet34}"""
    pretrained: bool | str = False
    """true: start from the published weights; or a .safetensors or .pth file, whose head is left out"""
    freeze: tuple[str, ...] = ()
    """patterns of parameters that do not change: `layer1.*`, body, head; `!head` excepts; the last wins"""
    unfreeze: dict[str, Duration] = Field(default_factory=dict)
    """patterns that begin to change later, such as {layer4.*: 2ep}"""
    grad_checkpointing: bool = free(False)
    """compute activations twice instead of keeping them: less memory, a third more time"""
    compile: bool = free(False)
    """torch.compile: the first steps take minutes, the others less time"""
    channels_last: bool = free(False)
    """memory layout NHWC, faster for convolutions in half precision on a GPU"""

    @field_validator("pretrained", mode="before")
    @classmethod
    def _yes_or_no(cls, written: Any) -> Any:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "": False}
        return words.get(str(written).strip().lower(), written)
