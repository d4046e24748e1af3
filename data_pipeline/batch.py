"""The two things that flow: one sample between the stages, one micro-batch to the model.

Shapes: B samples of the micro-batch, H W pixels, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.plan import Work

if TYPE_CHECKING:
    import torch  # two seconds that whoever only looks at samples need not wait

Image = NDArray[np.uint8]  # [H, W, C]


class RawSample(NamedTuple):
    """A sample as it lies in its tar, and where."""

    work: Work
    number: int  # global sample number within the split
    key: str
    members: dict[str, bytes]  # by extension
    shard: str
    offset: int  # of the first member, bytes


class Sample(NamedTuple):
    """A decoded sample: image uint8 [H, W, C], target as the task defines it (multiclass: a class number)."""

    work: Work
    number: int
    key: str
    image: Image
    target: int


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process. Samples with `valid` false must count nowhere."""

    work: Work
    images: torch.Tensor  # uint8 [B, H, W, C]
    targets: torch.Tensor  # int64 [B]
    valid: torch.Tensor  # bool [B]
    keys: list[str]

    @property
    def last(self) -> bool:
        """Whether this closes the process's share of the global batch."""
        return self.work.piece + 1 == self.work.pieces
