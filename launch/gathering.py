"""How the launchers of several machines come together before each start."""

from __future__ import annotations

import errno
import os
import secrets
import shlex
import socket
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from launch.interfaces import addresses_of, is_loopback, owner_of_port
from launch.links import Links, Node
from launch.meeting import NODES, attend_meeting, host_meeting
from launch.options import Options
from launch.topology import LOOPBACK, Topology
from launch.wire import LONG, Line, Stranger
from training.config import UserError
from training.vigil.ending import Ended

PATIENCE = 15.0  # seconds for another launcher to answer that is there
BACKLOG = 4096
OPEN_HOUSE = "lockstep launch"  # what machines know of one another that were given none
SHOWN = 200  # characters of a command line
THE_ADDRESS = "give a name or address of node 0 that all nodes know"


class Group(NamedTuple):
    """The machines of one start."""

    topology: Topology
    links: Links
    token: str
    start: int
    listener: socket.socket | None  # where the processes meet, if process zero is here


def listen(options: Options) -> socket.socket:
    """Where the launcher of node 0 waits for the others; Ended, or USAGE where there is another node 0."""
    host, port = str(options.address), options.port
    found = addresses_of(host, seconds=options.wait, origin="--address ")
    outside = [address for address in found if not is_loopback(address)]
    # Many a machine's own name leads it to its loopback address, where the others cannot reach it.
    for address in found[:1] if is_loopback(host) else outside or [""]:
        try:
            return _server(address, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                _ask_for_another(options, address or LOOPBACK)
                what = f"error: port {port} of {host} is taken by {owner_of_port(port)}"
                raise Ended("RENDEZVOUS", what, hint="give another one on all nodes: --port") from None
            if error.errno != errno.EADDRNOTAVAIL:
                what = f"error: node 0 cannot listen at {host}:{port}: {error.strerror}"
                raise Ended("RENDEZVOUS", what, hint="give another one on all nodes: --port") from None
    what = f"error: --address {host} ({', '.join(found)}) is no address of {socket.gethostname()}, "
    raise Ended("RENDEZVOUS", f"{what}which is to be node 0", hint=THE_ADDRESS)


def _server(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=BACKLOG)


def _ask_for_another(options: Options, address: str) -> None:
    """USAGE where it is another node 0 of the same launch that has the port."""
    place = [(address, options.port)]
    with suppress(Ended):
        attend_meeting(place, {}, number=0, expected=options.nodes, token=_secret(), seconds=0.5, kind=NODES)


def _secret() -> str:
    """What the launchers of one launch have to know of one another."""
    return os.environ.get("LOCKSTEP_TOKEN") or OPEN_HOUSE


def gather(options: Options, here: Topology, words: list[str], start: int, port: socket.socket) -> Group:
    """Node 0 waits for the others; who they are, and where their processes meet. Ended, or USAGE.

    Fewer than all are enough after a while, where the options say so; their numbers close up.
    """
    meeting = host_meeting(
        port,
        _about(here, words),
        expected=options.nodes,
        least=options.least_nodes,
        token=_secret(),
        seconds=options.wait,
        judge=_judge,
        kind=NODES,
        keep=True,
    )
    numbers = [member.number for member in meeting.members]
    processes = tuple(int(member.about["processes"]) for member in meeting.members)
    links = Links(
        0,
        [
            Node(one.number, f"node {one.number} on {one.about['host']}", one.connection)
            for one in meeting.members
            if one.connection is not None
        ],
    )
    address = meeting.address or LOOPBACK
    listener = _server(address, 0) if sum(processes) > 1 else None
    topology = replace(here, processes=processes, node_rank=0, address=address)
    topology = replace(topology, port=listener.getsockname()[1] if listener else 0)
    secret = secrets.token_hex(16)
    roster = {"nodes": numbers, "processes": processes, "port": topology.port}
    links.tell({"roster": {**roster, "token": secret, "start": start}})
    return Group(topology, links, secret, start, listener)


def attend(options: Options, here: Topology, words: list[str]) -> Group:
    """Another node comes to node 0 and is told the same."""
    meeting = attend_meeting(
        [(str(options.address), options.port)],
        _about(here, words),
        number=options.node_rank,
        expected=options.nodes,
        token=_secret(),
        seconds=options.wait,
        kind=NODES,
        origin="--address ",
        keep=True,
    )
    connection = meeting.members[0].connection
    assert connection is not None
    try:
        roster = Line(connection).wait(until=time.monotonic() + PATIENCE, longest=LONG)["roster"]
        place = roster["nodes"].index(options.node_rank)
        topology = replace(
            here,
            processes=tuple(map(int, roster["processes"])),
            node_rank=place,
            address=meeting.address,
            port=int(roster["port"]),
        )
        secret, start = str(roster["token"]), int(roster["start"])
    except (Stranger, OSError, KeyError, TypeError, ValueError):
        connection.close()
        what = f"error: node 0 at {options.address}:{options.port} is gone again"
        raise Ended("RENDEZVOUS", what, hint="see what it says, then start all nodes again") from None
    links = Links(options.node_rank, [Node(0, f"node 0 at {options.address}", connection)])
    return Group(topology, links, secret, start, None)


def _about(here: Topology, words: list[str]) -> dict[str, Any]:
    return {"processes": here.world, "cpu": here.cpu, "words": words}


def _judge(abouts: list[dict[str, Any]]) -> dict[str, Any]:
    """USAGE where nodes were not started alike."""
    zero = abouts[0]
    for about in abouts[1:]:
        if type(about.get("processes")) is not int or about["processes"] < 1:
            raise _differs(about, f"it says that it starts {about.get('processes')!r} processes")
        if about.get("cpu") is not zero["cpu"]:
            uses = ("GPUs", "CPUs") if zero["cpu"] else ("CPUs", "GPUs")
            raise _differs(about, f"it uses {uses[0]}, node 0 on {zero['host']} uses {uses[1]}")
        words = about.get("words")
        if words != zero["words"]:
            told = shlex.join(map(str, words)) if isinstance(words, list) else ""
            what = f"it was told -- {told[:SHOWN]}, node 0 on {zero['host']} "
            raise _differs(about, what + f"-- {shlex.join(zero['words'])[:SHOWN]}")
    return {}


def _differs(about: dict[str, Any], what: str) -> UserError:
    mend = "give the same command on all nodes, but for --node-rank"
    return UserError(f"node {about['number']} on {about['host']}: {what}", mend=mend, code="USAGE")
