"""Copies of what a network keeps beside its weights, such as running statistics, to put them back."""

from __future__ import annotations

import torch


class BufferCopies:
    """All buffers of a network as they are now; a few kernels, however many layers have some."""

    def __init__(self, network: torch.nn.Module) -> None:
        self._buffers: dict[torch.dtype, list[torch.Tensor]] = {}
        # Each time anew: a network may put another tensor into the place of a buffer.
        self._places = [
            (module, name, buffer)
            for module in network.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        for _, _, buffer in self._places:
            self._buffers.setdefault(buffer.dtype, []).append(buffer)
        with torch.no_grad():
            self._copies = {
                dtype: torch.cat([buffer.reshape(-1) for buffer in buffers])
                for dtype, buffers in self._buffers.items()
            }

    @torch.no_grad()
    def put_back(self) -> None:
        """Give every buffer the values, and the tensor, that it had."""
        for module, name, buffer in self._places:
            module._buffers[name] = buffer
        for dtype, buffers in self._buffers.items():
            pieces = torch.split(self._copies[dtype], [buffer.numel() for buffer in buffers])
            shaped = [piece.view(buffer.shape) for piece, buffer in zip(pieces, buffers, strict=True)]
            torch._foreach_copy_(buffers, shaped)
