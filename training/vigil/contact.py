"""Connections between process zero and each other one, which the kernel closes when a process or host ends.

A process that was stopped, or never gives up the interpreter's lock, keeps its connection: it is late, not
gone.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import threading
import time
from typing import Any

from training.vigil.siblings import Sibling

LOOPBACK = "127.0.0.1"
LOST_AFTER = 12  # seconds without a word of a host's kernel
HANDSHAKE = 10.0  # seconds for a connection to be made and to say who it is
LONGEST = 1 << 16  # bytes of a message; who sends more is a stranger
STRANGERS = 64  # connections at once that have not said who they are

Message = dict[str, Any]


class _Peer:
    """One end of a connection; messages are lines of JSON."""

    def __init__(self, connection: socket.socket, rank: int | None = None) -> None:
        self.socket, self.rank, self.since = connection, rank, time.monotonic()
        self._in, self._out = b"", b""
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        third = LOST_AFTER // 3
        for name, value in (("TCP_KEEPIDLE", third), ("TCP_KEEPINTVL", third), ("TCP_KEEPCNT", 2)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_AFTER)

    def send(self, message: Message) -> None:
        """As much as the other side takes at once; the rest goes with the next message."""
        if len(self._out) < LONGEST:
            self._out += json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError):  # that it is gone is heard by whoever reads
            self._out = self._out[self.socket.send(self._out) :]

    def receive(self) -> list[Message]:
        """What has come; EOFError where the other side is gone, or is a stranger."""
        try:
            data = self.socket.recv(LONGEST)
        except BlockingIOError:
            return []
        except OSError:
            raise EOFError from None
        *lines, self._in = (self._in + data).split(b"\n")
        if not data or len(self._in) > LONGEST:
            raise EOFError
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            raise EOFError from None
        if not all(isinstance(message, dict) for message in messages):
            raise EOFError
        return messages


class Contact:
    """What a process hears from those it is connected with: process zero from all, the others from it."""

    def __init__(self) -> None:
        self.token = ""
        self._listener: socket.socket | None = None
        self._peers: dict[int, _Peer] = {}  # by file descriptor
        self._lock = threading.RLock()

    def listen(self) -> int:
        """Take connections, on the address that the processes meet at; the port."""
        self.token = secrets.token_hex(16)
        for address, family in _own_addresses():
            with contextlib.suppress(OSError):
                self._listener = socket.create_server((address, 0), family=family, backlog=4096)
                self._listener.setblocking(False)
                break
        assert self._listener is not None
        port: int = self._listener.getsockname()[1]
        return port

    def connect(self, zero: Sibling, *, rank: int) -> None:
        """Reach process zero; OSError where that is not possible."""
        host = LOOPBACK if _on_one_machine() else os.environ["MASTER_ADDR"]
        connection = socket.create_connection((host, zero.port), timeout=HANDSHAKE)
        peer = _Peer(connection, rank=0)
        self._peers[connection.fileno()] = peer
        peer.send({"token": zero.token, "rank": rank})

    def files(self) -> list[int]:
        """File descriptors on which something may come."""
        return [*self._peers, *([self._listener.fileno()] if self._listener else [])]

    def send(self, message: Message) -> None:
        """To everyone that this process is connected with."""
        with self._lock:
            for peer in list(self._peers.values()):
                if peer.rank is not None:
                    peer.send(message)

    def receive(self, files: set[int]) -> list[tuple[int, Message | None]]:
        """Who said what on those of `files` that are ours; None: who is gone."""
        with self._lock:
            if self._listener is not None and self._listener.fileno() in files:
                self._accept(self._listener)
            heard: list[tuple[int, Message | None]] = []
            for file, peer in list(self._peers.items()):
                if file in files or peer.rank is None:
                    heard += self._heard(peer)
            return heard

    def _heard(self, peer: _Peer) -> list[tuple[int, Message | None]]:
        try:
            messages = peer.receive()
            if peer.rank is None and messages:
                peer.rank = self._recognised(messages.pop(0))
            if peer.rank is None and time.monotonic() - peer.since > HANDSHAKE:
                raise EOFError
        except EOFError:
            del self._peers[peer.socket.fileno()]
            peer.socket.close()
            return [] if peer.rank is None else [(peer.rank, None)]
        return [] if peer.rank is None else [(peer.rank, message) for message in messages]

    def _recognised(self, message: Message) -> int:
        """The rank of whoever is there; EOFError for a stranger."""
        token, rank = message.get("token"), message.get("rank")
        known = {peer.rank for peer in self._peers.values()}
        same = isinstance(token, str) and hmac.compare_digest(token.encode(), self.token.encode())
        if not same or not isinstance(rank, int) or rank in known:
            raise EOFError
        return rank

    def _accept(self, listener: socket.socket) -> None:
        while sum(peer.rank is None for peer in self._peers.values()) < STRANGERS:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self._peers[connection.fileno()] = _Peer(connection)


def _on_one_machine() -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def _own_addresses() -> list[tuple[str, socket.AddressFamily]]:
    """What process zero may listen on, the narrowest first: on one machine nobody else gets that far."""
    if _on_one_machine():
        return [(LOOPBACK, socket.AF_INET)]
    found = []
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(os.environ["MASTER_ADDR"], None, type=socket.SOCK_STREAM)
    addresses = [(str(address[0]), family) for family, _, _, _, address in found]
    # Many a machine's own name leads it to its loopback address, where the others cannot reach it.
    outside = [(address, family) for address, family in addresses if not address.startswith(("127.", "::1"))]
    return [*outside, ("", socket.AF_INET)]
