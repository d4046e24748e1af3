"""Connections between process zero and each other one, which the kernel closes when a process or host ends.

A process that was stopped, or never gives up the interpreter's lock, keeps its connection: it is late, not
gone. Where a host or the network in between is gone nobody closes anything, and the other kernel's silence
tells.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hmac
import json
import os
import secrets
import socket
import sys
import termios
import threading
import time
from collections.abc import Sequence
from typing import Any

from training.vigil.siblings import Sibling

LOOPBACK = "127.0.0.1"
LOST_AFTER = 10  # seconds without a word of a host's kernel
SILENT = 30.0  # seconds after which news are kept from a process that says none: they would pile up
HANDSHAKE = 10.0  # seconds for a connection to be made and to say who it is
LONGEST = 1 << 16  # bytes of a message; who sends more is a stranger
STRANGERS = 64  # connections at once that have not said who they are
CLOSED = (errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE)  # what a kernel says of a process that is gone

Message = dict[str, Any]
LOST: Message = {"lost": True}  # known by identity: no word of the other kernel


class Lost(Exception):
    """The other side's kernel has not answered for LOST_AFTER seconds."""


class _Peer:
    """One end of a connection; messages are lines of JSON."""

    def __init__(self, connection: socket.socket, rank: int | None = None) -> None:
        self.socket, self.rank, self.since = connection, rank, time.monotonic()
        self._in, self._out = b"", b""
        self._sent, self._taken = 0, 0  # bytes; taken by the other kernel
        self._taken_at = self.heard_at = self.since
        self.lost = False
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        part = LOST_AFTER // 5
        for name, value in (("TCP_KEEPIDLE", 2 * part), ("TCP_KEEPINTVL", part), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_AFTER)

    def send(self, message: Message) -> None:
        """As much as the other side takes at once; the rest goes with the next message."""
        self._look()
        if len(self._out) < LONGEST:
            self._out += json.dumps(message).encode() + b"\n"
        try:
            sent = self.socket.send(self._out)
            self._out, self._sent = self._out[sent:], self._sent + sent
        except OSError as error:
            # The kernel tells this once: whoever reads next hears that it is gone, not how.
            self.lost = self.lost or _is_lost(error)

    def _look(self) -> None:
        """See whether the other kernel takes what it is sent.

        Ours takes much longer to give up where it is itself that has no way to the other, or where the other
        one's packets still come.
        """
        waiting = 0
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                waiting = int.from_bytes(fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        now = time.monotonic()
        if not waiting or self._sent - waiting != self._taken:
            self._taken, self._taken_at = self._sent - waiting, now
        elif now - self._taken_at > LOST_AFTER:
            self.lost = True

    def receive(self) -> list[Message]:
        """What has come; EOFError where the other side is gone, or a stranger; Lost."""
        if self.lost:
            raise Lost
        try:
            data = self.socket.recv(LONGEST)
        except BlockingIOError:
            return []
        except OSError as error:
            raise (Lost if _is_lost(error) else EOFError) from None
        self.heard_at = time.monotonic()
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


def _is_lost(error: OSError) -> bool:
    """Of a host that is gone there is a time-out, or what a router on the way, or this one, has to say."""
    return not isinstance(error, BlockingIOError) and error.errno not in CLOSED


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

    def send(self, message: Message, *, news: bool = False) -> None:
        """To everyone that this process is connected with; `news` comes again and may be missed."""
        with self._lock:
            for peer in list(self._peers.values()):
                silent = time.monotonic() - peer.heard_at > SILENT
                if peer.rank is not None and not (news and silent):
                    peer.send(message)

    def receive(self, files: set[int]) -> list[tuple[int, Message | None]]:
        """Who said what on those of `files` that are ours; None: who is gone; LOST: cannot be reached."""
        with self._lock:
            if self._listener is not None and self._listener.fileno() in files:
                self._accept(self._listener)
            heard: list[tuple[int, Message | None]] = []
            for file, peer in list(self._peers.items()):
                if file in files or peer.lost or peer.rank is None:
                    heard += self._heard(peer)
            return heard

    def _heard(self, peer: _Peer) -> list[tuple[int, Message | None]]:
        try:
            messages = peer.receive()
            if peer.rank is None and messages:
                peer.rank = self._recognised(messages.pop(0))
            if peer.rank is None and time.monotonic() - peer.since > HANDSHAKE:
                raise EOFError
        except (EOFError, Lost) as error:
            del self._peers[peer.socket.fileno()]
            peer.socket.close()
            return [] if peer.rank is None else [(peer.rank, LOST if isinstance(error, Lost) else None)]
        return [] if peer.rank is None else [(peer.rank, message) for message in messages]

    def _recognised(self, message: Message) -> int:
        """The rank of whoever is there; EOFError for a stranger."""
        token, rank = message.get("token"), message.get("rank")
        known = {peer.rank for peer in self._peers.values()}
        same = isinstance(token, str) and token.isascii() and hmac.compare_digest(token, self.token)
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


def lost_words(lost: Sequence[Sibling]) -> str:
    """That these processes, in order of their ranks, cannot be reached any more."""
    hosts: dict[str, list[str]] = {}
    for one in lost:
        hosts.setdefault(one.host, []).append(str(one.rank))
    places = []
    for host, ranks in hosts.items():
        *first, last = ranks
        several = f"processes {', '.join(first)} and {last}" if first else f"process {last}"
        places.append(f"{several} on {host}")
    have, whose = ("has", "its") if len(lost) == 1 else ("have", "their")
    gone = "host or the network is gone" if len(hosts) == 1 else "hosts or the network are gone"
    *before, end = places
    who = f"{', '.join(before)} and {end}" if before else end
    return f"{who} {have} not been heard of for {LOST_AFTER} seconds: {whose} {gone}"


def _on_one_machine() -> bool:
    same = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return same or os.environ.get("MASTER_ADDR") in ("localhost", LOOPBACK)


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
