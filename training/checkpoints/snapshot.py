"""Holds a copy of a job's tensors in host memory, which a thread can write while the training goes on.

The memory is allocated and touched once, before the first save: a fresh allocation costs several times what
the copy does. What comes from a GPU is page-locked, so that the copy runs at the speed of the bus.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from training.checkpoints.tensor_file import Tensors


class Layout(NamedTuple):
    """What a buffer must look like to take a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    pinned: bool


def layout_of(tensor: torch.Tensor) -> Layout:
    """The buffer that takes this tensor."""
    return Layout(tensor.shape, tensor.dtype, tensor.device.type == "cuda")


class Snapshot:
    """Tensors by file and name, as they were at the last `take`."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], tuple[Layout, torch.Tensor]] = {}
        self.files: dict[str, dict[str, torch.Tensor]] = {}

    @property
    def size(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for _, buffer in self._buffers.values())

    def reserve(self, layouts: Mapping[str, Mapping[str, Layout]]) -> None:
        """Get the memory for tensors of such layouts, by file and name."""
        for file, named in layouts.items():
            for name, layout in named.items():
                self._buffer(file, name, layout)

    def take(self, files: Mapping[str, Tensors]) -> None:
        """Copy the tensors; the copies are whole when this returns."""
        self.files = {}
        for file, tensors in files.items():
            self.files[file] = {}
            for name, tensor in tensors.items():
                buffer = self._buffer(file, name, layout_of(tensor))
                buffer.copy_(tensor, non_blocking=True)
                self.files[file][name] = buffer
        if any(layout.pinned for layout, _ in self._buffers.values()):
            torch.cuda.synchronize()

    def _buffer(self, file: str, name: str, layout: Layout) -> torch.Tensor:
        known = self._buffers.get((file, name))
        if known is not None and known[0] == layout:
            return known[1]
        buffer = torch.empty(layout.shape, dtype=layout.dtype, pin_memory=layout.pinned)
        buffer.fill_(0)  # the system hands out pages at the first touch, not before
        self._buffers[file, name] = layout, buffer
        return buffer
