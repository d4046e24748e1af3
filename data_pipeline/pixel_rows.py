"""The rows of a micro-batch in a buffer: first all images, behind them all masks.

Shapes: B samples of the micro-batch, H W pixels, C channels.
"""

from __future__ import annotations

from data_pipeline.batch import Image, Mask
from data_pipeline.slots import Buffer


def pixel_bytes(count: int, shape: tuple[int, ...], *, masked: bool) -> int:
    """Bytes of `count` images of `shape` (H, W, C), with their masks where there are some."""
    height, width, channels = shape
    return count * height * width * (channels + masked)


def pixel_arrays(
    buffer: Buffer, count: int, shape: tuple[int, ...], *, masked: bool
) -> tuple[Image, Mask | None]:
    """Views of a buffer: images [B, H, W, C] and, behind them, masks [B, H, W]."""
    size = pixel_bytes(count, shape, masked=False)
    images = buffer[:size].reshape(count, *shape)
    if not masked:
        return images, None
    return images, buffer[size : size + count * shape[0] * shape[1]].reshape(count, *shape[:2])


def is_same_array(one: Image, other: Image) -> bool:
    """Whether two views of one shape are the same place in memory."""
    return (
        one.__array_interface__["data"] == other.__array_interface__["data"] and one.strides == other.strides
    )
