"""What the launchers of several machines tell one another while their processes run."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from launch.attempts import Outcome
from launch.children import Others
from launch.wire import LONG, Line, Stranger, send_line
from training.vigil.ending import EXIT_CODES

LOST_AFTER = 10  # seconds without a word of another machine's kernel
PARTING = 3.0  # seconds for the others to leave first
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
        self._stopping = False
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

    def stopping(self) -> None:
        """Tell the others that this launcher was asked to stop: their processes may not have met ours yet."""
        if not self._stopping:
            self._stopping = True
            self.tell({"stopping": True})

    def stop(self) -> bool:
        """Whether another one was asked to."""
        self.hear()
        return any("stopping" in said for said in self._said.values())

    def tell(self, message: Mapping[str, Any]) -> None:
        """To all of them; who cannot be told is lost."""
        for node in self._nodes.values():
            if node.number not in self.lost:
                try:
                    send_line(node.connection, dict(message))
                except OSError:
                    self._lose(node.number)

    def part(self) -> None:
        """Wait until the others have left: what has not been read when we close may be lost."""
        for node in self._nodes.values():
            with contextlib.suppress(OSError):
                node.connection.shutdown(socket.SHUT_WR)
        until = time.monotonic() + PARTING
        while self.files() and time.monotonic() < until:
            _readable(self.files(), PARTING)
            self.hear()

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
        while ready := _readable(self.files(), 0):
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
            if self._me in (0, number):  # node 0 tells everybody
                self.tell({"failing": True})


def _readable(files: Sequence[int], seconds: float) -> set[int]:
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    return {file for file, _ in poll.poll(1000 * seconds)} if files else set()


def _notice_silence(connection: socket.socket) -> None:
    """Let the kernel ask, and tell us when nobody answers."""
    connection.settimeout(TELLING)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 2)):
        with contextlib.suppress(AttributeError):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    with contextlib.suppress(AttributeError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_AFTER)
