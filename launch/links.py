"""What the launchers of several machines tell one another while their processes run."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from launch.attempts import Outcome
from launch.children import Others
from launch.wire import LONG, Line, Stranger, send_line
from training.vigil.ending import EXIT_CODES

LOST_AFTER = 10  # seconds without a word of another machine's kernel
TELLING = 5.0  # seconds for another launcher to take what it is told


class Node(NamedTuple):
    """Another machine."""

    number: int
    name: str  # for messages
    connection: socket.socket


class Links(Others):
    """Of the launcher of node 0 to each other one, of the others to it; closed when the block is left.

    A machine whose launcher is gone, or cannot be reached any more, counts as failed.
    """

    def __init__(self, me: int, nodes: Iterable[Node]) -> None:
        self._me = me
        self._nodes = {node.number: node for node in nodes}
        self._lines = {number: Line(node.connection) for number, node in self._nodes.items()}
        self._said: dict[int, dict[str, Any]] = {number: {} for number in self._nodes}
        self.lost: list[int] = []
        self.failures: list[int] = []  # nodes, in the order in which they failed
        for node in self._nodes.values():
            _notice_silence(node.connection)

    def __enter__(self) -> Links:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._nodes.values():
            node.connection.close()

    def files(self) -> list[int]:
        """Connections on which something may come."""
        there = (node for node in self._nodes.values() if node.number not in self.lost)
        return [node.connection.fileno() for node in there]

    def failing(self) -> None:
        """Tell the others that a process here has failed."""
        self._note_failure(self._me)

    def failed(self) -> bool:
        """Whether something has failed, here or elsewhere."""
        self.hear()
        return bool(self.failures)

    def tell(self, message: Mapping[str, Any]) -> None:
        """To all of them; who cannot be told is lost."""
        for node in self._nodes.values():
            if node.number not in self.lost:
                try:
                    send_line(node.connection, dict(message))
                except OSError:
                    self._lose(node.number)

    def said(self, name: str) -> dict[int, Any]:
        """What the others have said under this name, by number of the node."""
        return {number: message[name] for number, message in self._said.items() if name in message}

    def waits_for(self, name: str) -> list[int]:
        """Nodes that are there and have not said that yet."""
        return [one for one in self._nodes if one not in self.lost and name not in self._said[one]]

    def gone(self, number: int) -> Outcome:
        """How a start ends that has lost this node."""
        what = (
            f"{self._nodes[number].name} is gone: its launcher has ended, or its machine or the network has"
        )
        return Outcome(EXIT_CODES["RENDEZVOUS"], "RENDEZVOUS", what, spoken=False)

    def name_of(self, number: int) -> str:
        """A node in words."""
        node = self._nodes.get(number)
        return f"node {number} on {socket.gethostname()}" if node is None else node.name

    def hear(self) -> None:
        """Take what has come."""
        while ready := select.select(self.files(), [], [], 0)[0]:
            for number, node in self._nodes.items():
                if number not in self.lost and node.connection.fileno() in ready:
                    self._hear(number)

    def _hear(self, number: int) -> None:
        try:
            message = self._lines[number].receive(longest=LONG)
        except (Stranger, OSError):
            self._lose(number)
            return
        if message is not None and "failing" in message:
            self._note_failure(number)
        elif message is not None:
            self._said[number] |= message

    def _lose(self, number: int) -> None:
        self.lost.append(number)
        # A launcher leaves when it has said how its processes ended and has heard how the start did.
        if "over" not in self._said[number] and "verdict" not in self._said[number]:
            self._note_failure(number)

    def _note_failure(self, number: int) -> None:
        if number not in self.failures:
            self.failures.append(number)
            self.tell({"failing": True})


def _notice_silence(connection: socket.socket) -> None:
    """Let the kernel ask, and tell us when nobody answers."""
    connection.settimeout(TELLING)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 2)):
        with contextlib.suppress(AttributeError):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    with contextlib.suppress(AttributeError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_AFTER)
