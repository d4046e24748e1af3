"""The buffers that batches are made in: allocated once, used again, shared with reader processes.

Fresh memory for every batch costs more than a third of the decoding: page faults, and a descriptor a batch
where processes hand it over.
"""

from __future__ import annotations

import mmap
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Buffer = NDArray[np.uint8]


class Slots:
    """`count` buffers of `capacity` bytes. A slot that was released is handed out again once it is safe.

    `shared`: the memory is inherited by forked processes. It is anonymous: nothing of it lies in /dev/shm,
    whose size containers limit, and nothing can be left behind. `pinned`: page-locked, so that copies to a
    GPU overlap; a copy may be under way when its slot is released, so that slot waits for it.
    """

    def __init__(self, count: int, capacity: int, *, shared: bool, pinned: bool) -> None:
        self._pinned = pinned
        # Two more than are filled ahead, so that waiting for a copy never means waiting for the last step.
        self._count = count + (2 if pinned else 0)
        self._capacity = max(1, capacity)
        size = self._count * self._capacity
        if shared:
            self._memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        else:
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._shared, self._locked = shared, False
        self._free = deque(range(self._count))
        self._copied: deque[tuple[int, torch.cuda.Event]] = deque()

    def lock_pages(self) -> None:
        """Page-lock shared memory, where it is to be: after the processes that inherit it were forked."""
        if self._pinned and self._shared and not self._locked:
            _runtime().cudaHostRegister(self._memory.data_ptr(), self._memory.numel(), 0)
            self._locked = True

    def unlock_pages(self) -> None:
        """Take the lock off again, before more processes are forked and at the end."""
        if self._locked:
            torch.cuda.synchronize()
            _runtime().cudaHostUnregister(self._memory.data_ptr())
            self._locked = False

    def take(self) -> int:
        """The number of a slot that nobody uses."""
        if not self._free:
            slot, event = self._copied.popleft()
            event.synchronize()
            return slot
        return self._free.popleft()

    def release(self, slot: int) -> None:
        """Give a slot back; copies out of it may be under way on the current stream of the GPU."""
        if not self._pinned:
            self._free.append(slot)
            return
        event: torch.cuda.Event = _event()
        event.record()
        self._copied.append((slot, event))

    def tensor(self, slot: int) -> torch.Tensor:
        """The bytes of a slot, uint8 [capacity]."""
        return self._memory[slot * self._capacity : (slot + 1) * self._capacity]

    def array(self, slot: int) -> Buffer:
        """The same bytes for numpy."""
        array: Buffer = self.tensor(slot).numpy()
        return array


# torch leaves both of these untyped.
_runtime: Any = torch.cuda.cudart
_event: Any = torch.cuda.Event
