"""A meeting over TCP, of processes or machines: one is the host, the others come, all hear one verdict.

Both sides prove that they know the secret of this start: the one who comes sends a number, the host its proof
and a number of its own, the one who comes its proof and who it is. Whoever does not is a stranger, ignored.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.door import Door
from launch.interfaces import addresses_of, is_loopback
from launch.members import NODES as NODES
from launch.members import PROCESSES as PROCESSES
from launch.members import About, Kind, check_numbers, introduction, missing
from launch.members import Meeting as Meeting
from launch.members import Member as Member
from launch.wire import LONG, Line, Stranger, fresh, is_proof, proof, send_line
from training.config import UserError
from training.vigil.ending import EXIT_CODES, Ended

LINGER = 1.0  # seconds in which those who are about to come are told why there is no meeting
ANSWER = 2.0  # seconds for whoever listens to answer
PATIENCE = 5.0  # seconds beyond what the host said for its verdict to come
PAUSE, LONGEST_PAUSE = 0.1, 0.5  # seconds between two tries to reach the host

Judge = Callable[[list[About]], dict[str, Any]]


class Told(Ended):
    """There is no meeting, for a reason that the host gives to all."""


def host_meeting(
    listener: socket.socket,
    mine: Mapping[str, Any],
    *,
    expected: int,
    token: str,
    seconds: float,
    judge: Judge = lambda abouts: {},
    least: int | None = None,
    kind: Kind = PROCESSES,
    keep: bool = False,
) -> Meeting:
    """Be number 0 of `expected` members; returns when all are there, or `least` of them after `seconds`.

    `judge` gets what everybody says of itself (Member.about), by number, and returns what everybody is told;
    UserError and Ended that it raises are raised at everybody. With `keep`, connections stay open. UserError
    where members contradict one another, at once; Ended where some are missing. The socket stays open.
    """
    door = Door(listener, token=token, until=(until := time.monotonic() + seconds))
    me = introduction(mine, 0, expected)
    abouts = [me]
    try:
        while len(abouts) < expected and (left := until - time.monotonic()) > 0:
            door.wait(left)
            abouts = [me, *(guest.about for guest in door.guests())]
            check_numbers(abouts, kind)
        if len(abouts) < (least or expected):
            raise missing(abouts, seconds, kind)
        verdict = judge(abouts)
        guests = door.guests()
        own = (str(guest.connection.getsockname()[0]) for guest in guests)
        outside = next((address for address in own if not is_loopback(address)), "")
        door.tell({"verdict": verdict, "address": outside})
    except UserError as error:
        _refuse(door, {"code": error.code, "what": error.what, "hint": error.mend}, linger=LINGER)
        raise
    except Ended as error:
        _refuse(door, {"code": error.code, "what": error.what, "hint": error.hint}, linger=0)
        raise
    except BaseException:
        door.close()
        raise
    for guest in guests:
        guest.connection.settimeout(None)
    members = [Member(guest.number, guest.about, guest.connection if keep else None) for guest in guests]
    door.close(but=guests if keep else ())
    return Meeting((Member(0, me), *members), verdict, outside, listener.getsockname()[1], outside)


def _refuse(door: Door, refused: dict[str, str], *, linger: float) -> None:
    """Tell everybody, also those who are just about to come, why there is no meeting."""
    end = time.monotonic() + linger
    while True:
        door.tell({"refused": refused})
        for guest in door.guests():
            door.dismiss(guest)
        if (left := end - time.monotonic()) <= 0:
            break
        door.wait(left)
    door.close()


def attend_meeting(
    candidates: Sequence[tuple[str, int]],
    mine: Mapping[str, Any],
    *,
    number: int,
    expected: int,
    token: str,
    seconds: float,
    kind: Kind = PROCESSES,
    origin: str = "",
    keep: bool = False,
) -> Meeting:
    """Come, as member `number` of `expected`, to the meeting whose host is at one of `candidates`.

    `origin` names what gave the host's name, for messages: "MASTER_ADDR=". What the host tells all is
    returned, or raised: UserError for contradictions, Told for all else. Ended where it cannot be reached.
    """
    me = introduction(mine, number, expected)
    pause, until = PAUSE, time.monotonic() + seconds
    while True:
        troubles = []
        for host, port in candidates:
            addresses = addresses_of(host, seconds=max(PAUSE, until - time.monotonic()), origin=origin)
            for address in addresses:
                outcome = _attend_at(address, port, me, token=token, until=until, keep=keep)
                if isinstance(outcome, Meeting):
                    return outcome
                troubles.append(outcome)
        if time.monotonic() >= until:
            where = f"{candidates[0][0]}:{candidates[0][1]}"
            where += f" (or {len(candidates) - 1} other ports)" if candidates[1:] else ""
            what = f"error: {kind.one} {number} on {me['host']} cannot reach {kind.one} 0 at {where}: "
            hint = f"see whether {kind.one} 0 runs there and a firewall lets it be reached; "
            what += f"{troubles[0]} ({seconds:g} s)"
            raise Ended("RENDEZVOUS", what, hint=f"{hint}to wait longer: {kind.wait}")
        time.sleep(max(0.0, min(pause, until - time.monotonic())))
        pause = min(2 * pause, LONGEST_PAUSE)


def _attend_at(address: str, port: int, me: About, *, token: str, until: float, keep: bool) -> Meeting | str:
    """The meeting that is at this address; in words, what is in the way of it."""
    limit = time.monotonic() + max(PAUSE, min(ANSWER, until - time.monotonic()))
    try:
        connection = socket.create_connection((address, port), timeout=limit - time.monotonic())
    except OSError as error:
        return error.strerror or "it does not answer"
    kept = False
    try:
        line = Line(connection)
        patience = _greet(line, me, token, until=limit)
        message = line.wait(until=time.monotonic() + patience, longest=LONG)
        if isinstance(refused := message.get("refused"), dict):
            raise _as_error(refused)
        if not isinstance(verdict := message.get("verdict"), dict):
            return "something else answers there"
        kept = keep
        connection.settimeout(None)
        host = Member(0, {}, connection if keep else None)
        own = str(connection.getsockname()[0])
        if is_loopback(own) and message.get("address"):
            # Many a machine's own name leads it to its loopback address; this is how the others know it.
            own = address = str(message["address"])
        return Meeting((host,), verdict, address, port, own)
    except Stranger as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        if not kept:
            connection.close()


def _greet(line: Line, me: About, token: str, *, until: float) -> float:
    """Prove to one another who one is; the seconds within which the host will say more."""
    nonce = fresh()
    send_line(line.connection, {"nonce": nonce})
    answer = line.wait(until=until)
    if not is_proof(answer.get("proof"), proof(token, "host", nonce)):
        raise Stranger("the processes there belong to another start")
    ours = proof(token, "guest", answer.get("nonce"))
    send_line(line.connection, {"proof": ours, "about": me})
    seconds = answer.get("seconds")
    return PATIENCE + (seconds if isinstance(seconds, int | float) else 0)


def _as_error(refused: Mapping[str, Any]) -> UserError | Told:
    code, what, hint = (str(refused.get(name, "")) for name in ("code", "what", "hint"))
    return Told(code, what, hint=hint) if code in EXIT_CODES else UserError(what, mend=hint, code=code)
