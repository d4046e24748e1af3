"""Joins this process with the others in torch's process group, over the socket at which they have met."""

from __future__ import annotations

import datetime
import os
import socket

import torch.distributed as dist


def open_group(listener: socket.socket | None, *, cpu: bool, timeout: datetime.timedelta) -> None:
    """Open it, unless the process is alone, or torchrun's store is there: accelerate then does so itself.

    `listener` is process zero's, which is used up. accelerate takes a group that is open as it is.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    # torch exports it, only not in the way that mypy asks for.
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=rank == 0,
        timeout=timeout,
        # The store closes it in the end.
        master_listen_fd=None if listener is None else listener.detach(),
    )
    backend = "gloo" if cpu else "nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
