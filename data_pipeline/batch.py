"""The things that flow: one sample between the stages, one micro-batch to the model.

Shapes: B samples of the micro-batch, H W pixels, C channels or labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.fault import UserError
from data_pipeline.plan import Work

if TYPE_CHECKING:
    import torch  # two seconds that whoever only looks at samples need not wait

Encoded = bytes | memoryview  # a member's content; a view of what was read together with its neighbours
Image = NDArray[np.uint8]  # [H, W, C]
Mask = NDArray[np.uint8]  # [H, W] class numbers, masks.IGNORED where a pixel has none


class Size(NamedTuple):
    """Of a picture, in pixels."""

    height: int
    width: int


class Pixels(NamedTuple):
    """What transforms work on: an image and, in segmentation, its mask of the same height and width."""

    image: Image
    mask: Mask | None = None


class RawSample(NamedTuple):
    """A sample as it lies in its tar, and where; only the members that the task needs are read."""

    number: int  # global sample number within the split
    key: str
    image: Encoded
    mask: Encoded | None  # segmentation only
    label: Any  # multiclass: int; multilabel: int8 [C], 1, 0 or -1 for a missing label; segmentation: None
    shard: str
    offset: int  # of the image member, bytes from the start of the tar
    fault: UserError | None = None  # what is wrong with it, if anything is: then it holds no bytes


class Sample(NamedTuple):
    """A decoded sample; `target` is its class number, labels int8 [C], or None where it is `pixels.mask`."""

    work: Work
    number: int
    key: str
    pixels: Pixels
    target: Any
    draws: np.random.Generator  # the sample's own: where its transforms' parameters come from
    size: Size  # of its picture before any transform


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used, and the one in its place: a line of bad_samples.jsonl."""

    shard: str
    key: str
    offset: int  # bytes
    exception: str
    replaced_by: str  # key; empty where its row was left blank


@dataclass(frozen=True)
class Mixed:
    """MixUp and CutMix: sample i is `share[i]` itself and the rest of it a partner from the global batch."""

    targets: torch.Tensor  # of the partners, as Batch.targets
    share: torch.Tensor  # float32 [B], 1 where a sample is not mixed


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process. Samples with `valid` false must count nowhere.

    Its pixels lie in a buffer that is used again: they are there until the next batch is asked for.
    """

    work: Work
    images: torch.Tensor  # uint8 [B, H, W, C]
    targets: torch.Tensor  # int64 [B] (multiclass), int8 [B, C] (multilabel), uint8 [B, H, W] (segmentation)
    valid: torch.Tensor  # bool [B]
    keys: list[str]
    bad: tuple[BadSample, ...] = ()
    mixed: Mixed | None = None
    sizes: NDArray[np.int64] | None = None  # [B, 2], height and width of each picture before any transform
    blank: tuple[int, ...] = ()  # rows of zeros: their samples are those in `bad`, in the same order

    @property
    def last(self) -> bool:
        """Whether this closes the process's share of the global batch."""
        return self.work.piece + 1 == self.work.pieces
