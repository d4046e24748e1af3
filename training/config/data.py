"""Which samples a run reads and what is done to their pixels, as a recipe says it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from training.config.transforms import TransformStep
from training.config.tree import Fraction, Section, free

EMBEDDED_DIGITS = "embedded:digits"
Level = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Deviation = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class DataConfig(Section):
    """Which samples, and what is done to their pixels."""

    root: str = free("data")
    """folder or URL of dataset.json (it may move); embedded:digits is packed into data/digits on first use"""
    cache: str | None = free(None)
    """folder of this machine for the shards behind a URL; default: ~/.cache/lockstep"""
    cache_gib: float = free(64.0, gt=0, le=2**20)
    """GiB that the cache may hold; the shards used longest ago make room"""
    train_split: str = "train"
    """split to learn from"""
    val_split: str | None = "val"
    """split to evaluate; none: the loss of training chooses the best weights"""
    mean: tuple[Level, ...] | None = None
    """subtracted from each channel, of pixels scaled to 0..1; default: the training split's"""
    std: tuple[Deviation, ...] | None = None
    """each channel is divided by it; default: the training split's"""
    train_transforms: tuple[TransformStep, ...] = ()
    """applied in order to training images"""
    eval_transforms: tuple[TransformStep, ...] = ()
    """applied in order to images that are evaluated"""
    lanes: PositiveInt | None = None
    """streams that a global batch is dealt from; default: greatest common divisor of global batch and 8"""
    shuffle_block: PositiveInt = 4096
    """consecutive samples of a lane that are permuted together"""
    balance: Fraction = 0.0
    """0: every sample once an epoch; 1: every class equally often in an epoch of the same length"""
    mixup: float = Field(default=0.0, ge=0, le=4)
    """alpha of the Beta distribution that two images are blended by; 0: off"""
    cutmix: float = Field(default=0.0, ge=0, le=4)
    """alpha of the Beta distribution that fixes the area pasted from another image; 0: off"""
    max_bad: Fraction = free(0.001)
    """share of the training split that may be broken and is left out, each time by the same neighbour"""
    workers: int = free(2, ge=0, le=256)
    """readers *per process*; 0 reads in the training thread"""
    worker_kind: Literal["threads", "processes"] = free("processes")
    """threads start at once and need the least CPU; processes do not share the interpreter with training"""
    prefetch: PositiveInt = free(4)
    """batches that each worker reads ahead"""

    @property
    def location(self) -> str:
        """Folder or URL where dataset.json lies, or will when the embedded set is packed."""
        return "data/digits" if self.root == EMBEDDED_DIGITS else self.root
