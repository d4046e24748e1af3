"""Addresses: those that a host's name stands for, and those of this machine with their interfaces."""

from __future__ import annotations

import contextlib
import ipaddress
import shlex
import socket
import threading
import time

from training.vigil.ending import Ended

LOOPBACK = "127.0.0.1"
OUTSIDE = "192.0.2.1"  # an address that is never anybody's (RFC 5737): the default route leads there
UNKNOWN = 8.0  # seconds until a name that nobody knows is given up: containers get theirs a moment late
LEAST = 0.25  # seconds for an answer, and between two questions
SHOWN = 120  # letters of a command line


def addresses_of(host: str, *, seconds: float, origin: str = "") -> list[str]:
    """The addresses of a host, as numbers; Ended where it has none, or nobody says so.

    `origin` stands before the name in that message: "MASTER_ADDR=".
    """
    began = time.monotonic()
    while True:
        left = max(LEAST, seconds - (time.monotonic() - began))
        answer = _asked(host, left)
        if not isinstance(answer, str):
            return answer
        if time.monotonic() - began >= min(seconds, UNKNOWN):
            hint = "give a name or an address that all machines know"
            raise Ended("RENDEZVOUS", f"error: {origin}{host}: {answer}", hint=hint)
        time.sleep(LEAST)


def _asked(host: str, seconds: float) -> list[str] | str:
    """What the resolver says, or why it does not; it knows no limit itself, so it is asked in a thread."""
    answers: list[list[str] | str] = []

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            answers.append("no such host")
        else:
            answers.append(list(dict.fromkeys(str(address[0]) for *_, address in found)))

    thread = threading.Thread(target=ask, name="host-name", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else f"no name server answers within {seconds:.0f} seconds"


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address; a name other than localhost is none."""
    if address == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    return False


def address_towards(address: str) -> str | None:
    """This machine's address on the route to another; None where there is no route. Nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0])
    return None


def address_outside() -> str | None:
    """This machine's address for others: on its default route, else on its first interface that is up."""
    import psutil

    towards = address_towards(OUTSIDE)
    if towards is not None:
        return towards
    states = psutil.net_if_stats()
    for name, given in psutil.net_if_addrs().items():
        for one in given:
            usable = one.family == socket.AF_INET and not is_loopback(one.address)
            if usable and name in states and states[name].isup:
                return str(one.address)
    return None


def interface_of(address: str | None) -> str | None:
    """The interface of this machine that has the address; None where none has."""
    # It starts slowly, and a process alone needs it never.
    import psutil

    for name, given in psutil.net_if_addrs().items():
        if any(one.address == address for one in given):
            return str(name)
    return None


def owner_of_port(port: int) -> str:
    """The process that listens there, in words."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                command = shlex.join(psutil.Process(connection.pid).cmdline())
                return f"pid {connection.pid}: {command[:SHOWN]}"
    return "a process that this user may not see"
