"""Lines of JSON on a connection, and proofs that the other side knows a secret, which is never said."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import time
from typing import Any

SHORT = 1 << 16  # bytes of a line; who sends more is a stranger
LONG = 1 << 24  # bytes of what somebody says whom we know: a list of many machines


class Stranger(Exception):
    """Whoever is at the other end does not speak as one of us, or is gone; says so in words."""


class Line:
    """What comes on a connection, line by line; what stands behind a line stays in the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._parts: list[bytes] = []
        self._size = 0

    def receive(self, *, longest: int = SHORT) -> dict[str, Any] | None:
        """The line if all of it has come, else None; Stranger, or OSError of the connection."""
        try:
            waiting = self.connection.recv(SHORT, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        if not waiting:
            raise Stranger("the connection was closed")
        end = waiting.find(b"\n") + 1
        part = self.connection.recv(end or len(waiting))
        self._parts.append(part)
        self._size += len(part)
        if self._size > longest:
            raise Stranger("something else answers there")
        if not end:
            return None
        text, self._parts, self._size = b"".join(self._parts), [], 0
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            raise Stranger("something else answers there") from None
        if not isinstance(message, dict):
            raise Stranger("something else answers there")
        return message

    def wait(self, *, until: float, longest: int = SHORT) -> dict[str, Any]:
        """The next line; OSError where it has not come until then, by the monotonic clock."""
        while True:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError("it does not answer")
            self.connection.settimeout(left)
            message = self.receive(longest=longest)
            if message is not None:
                return message


def send_line(connection: socket.socket, message: dict[str, Any]) -> None:
    """All of it, within the connection's time-out; OSError."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def fresh() -> str:
    """A number that was never said before, for the other side's proof."""
    return secrets.token_hex(16)


def proof(token: str, side: str, nonce: object) -> str:
    """That this `side` knows the token, in answer to the other's number; Stranger where that is none."""
    if not isinstance(nonce, str) or not nonce.isascii():
        raise Stranger("something else answers there")
    return hmac.new(token.encode(), f"{side} {nonce}".encode(), hashlib.sha256).hexdigest()


def is_proof(answer: object, expected: str) -> bool:
    """Whether the other side knows the token."""
    return (
        isinstance(answer, str)
        and answer.isascii()
        and hmac.compare_digest(answer.encode(), expected.encode())
    )
