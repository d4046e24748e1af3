"""The host's side of a meeting: who has come in, and whether it is one of us."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

from launch.wire import Line, Stranger, fresh, is_proof, proof, send_line

HANDSHAKE = 5.0  # seconds for a connection to say who it is
CROWD = 256  # connections at once that have not
OVERDUE = 1.0  # seconds after which one of so many makes room for another
TELLING = 5.0  # seconds for one of us to take what it is told


class Guest:
    """A connection that was taken."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.line, self.since = connection, Line(connection), time.monotonic()
        self.nonce = ""  # ours, as soon as it has sent its own
        self.about: dict[str, Any] = {}  # as soon as it has said who it is

    @property
    def number(self) -> int:
        """Its number, as it says."""
        return int(self.about["number"])

    def is_again(self, other: Guest) -> bool:
        """Whether this is another one that lost its connection and has come again."""
        return all(self.about[name] == other.about[name] for name in ("number", "life"))


class Door:
    """The listening socket, which stays open, and the connections that came through it."""

    def __init__(self, listener: socket.socket, *, token: str, until: float) -> None:
        self._listener, self._token, self._until = listener, token, until
        self._inside: dict[int, Guest] = {}  # by file descriptor
        listener.setblocking(False)

    def guests(self) -> list[Guest]:
        """Those who have said who they are, by number."""
        return sorted((one for one in self._inside.values() if one.about), key=lambda one: one.number)

    def wait(self, seconds: float) -> None:
        """Until somebody says something, for at most so long, or less."""
        poll = select.poll()
        room = len(self._unknown()) < CROWD
        for file in [*self._inside, *([self._listener.fileno()] if room else [])]:
            poll.register(file, select.POLLIN)
        ready = {file for file, _ in poll.poll(1000 * max(0.0, min(seconds, OVERDUE)))}
        for file in ready & self._inside.keys():
            guest = self._inside.get(file)
            try:
                if guest is not None:
                    self._hear(guest)
            except (Stranger, OSError):
                self.dismiss(self._inside[file])
        self._lose_patience()
        if self._listener.fileno() in ready:
            self._accept()

    def _unknown(self) -> list[Guest]:
        return [one for one in self._inside.values() if not one.about]

    def _lose_patience(self) -> None:
        unknown, now = self._unknown(), time.monotonic()
        limit = OVERDUE if len(unknown) >= CROWD else HANDSHAKE
        for guest in unknown:
            if now - guest.since > limit:
                self.dismiss(guest)

    def _accept(self) -> None:
        for _ in range(CROWD - len(self._unknown())):
            try:
                connection, _ = self._listener.accept()
            except OSError:  # nobody is left, or too many files are open
                return
            self._inside[connection.fileno()] = Guest(connection)

    def _hear(self, guest: Guest) -> None:
        """Take what it says; Stranger where it is one, or is gone."""
        message = guest.line.receive()
        if message is None:
            return
        if not guest.nonce:
            guest.nonce = fresh()
            ours = proof(self._token, "host", message.get("nonce"))
            left = max(0.0, self._until - time.monotonic())
            send_line(guest.connection, {"proof": ours, "nonce": guest.nonce, "seconds": left})
            return
        about = message.get("about")
        known = is_proof(message.get("proof"), proof(self._token, "guest", guest.nonce))
        if not known or guest.about or not isinstance(about, dict) or not _is_introduction(about):
            raise Stranger
        guest.about = about
        for other in self.guests():
            if other is not guest and guest.is_again(other):
                self.dismiss(other)

    def dismiss(self, guest: Guest) -> None:
        """Let somebody go."""
        self._inside.pop(guest.connection.fileno(), None)
        guest.connection.close()

    def tell(self, message: dict[str, Any]) -> None:
        """Say it to all who have said who they are; who is gone by now is missed later."""
        for guest in self.guests():
            with contextlib.suppress(OSError):
                guest.connection.settimeout(TELLING)
                send_line(guest.connection, message)

    def close(self, *, but: Sequence[Guest] = ()) -> None:
        """Let everybody go."""
        for guest in list(self._inside.values()):
            if guest not in but:
                self.dismiss(guest)


def _is_introduction(about: dict[str, Any]) -> bool:
    kinds = {"number": int, "expected": int, "host": str, "pid": int, "life": str}
    return all(type(about.get(name)) is kind for name, kind in kinds.items()) and about["number"] >= 0
