"""How the processes of a start find one another before torch is loaded, or say who did not come."""

from __future__ import annotations

import contextlib
import errno
import math
import socket
import time
from collections.abc import Mapping, MutableMapping, Sequence

from launch.interfaces import (
    LOOPBACK,
    address_outside,
    addresses_of,
    interface_of,
    is_loopback,
    owner_of_port,
)
from launch.meeting import Told, attend_meeting, host_meeting
from launch.topology import step_port
from training.config import UserError
from training.vigil.ending import EXIT_CODES, Ended

WAIT = 15.0  # seconds for those who are missing
LEAVING = 5.0  # seconds for an earlier start that is just ending to free the port
ANSWER = 3.0  # seconds for an address to answer, of several perhaps
PAUSE = 0.2  # seconds between two tries
ATTEMPTS = 8  # ports of a step of srun, whose first may be taken by somebody else


def meet(env: MutableMapping[str, str]) -> socket.socket | None:
    """Wait until every process of this start is there; process zero's listening socket, the others' None.

    `env` is as launch.started has checked it. Afterwards its MASTER_ADDR and MASTER_PORT say in numbers where
    process zero is, and GLOO_SOCKET_IFNAME on which interface the others are, unless somebody has set it.
    Under torchrun and accelerate their agents have met, so it only sees that their store can be reached.
    Ended where somebody is missing or cannot be reached, UserError where processes contradict one another.
    """
    world = int(env.get("WORLD_SIZE") or 1)
    if world == 1:
        return None
    seconds = _patience(env)
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _reach_agent(env, seconds)
        return None
    if env.get("RANK", "0") == "0":
        return _host(env, world, seconds)
    try:
        _attend(env, world, seconds)
    except Told as told:
        # Process zero says it, and beside it the first process of each other machine.
        if env.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(EXIT_CODES[told.code]) from None
        raise
    return None


def _host(env: MutableMapping[str, str], world: int, seconds: float) -> socket.socket:
    listener = _given_listener(env) or _listen(env, seconds)
    try:
        meeting = host_meeting(listener, {}, expected=world, token=_token(env), seconds=seconds)
    except BaseException:
        listener.close()
        raise
    address, port = listener.getsockname()[:2]
    if address in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        address = meeting.address or LOOPBACK
    _settle(env, address=address, port=port, own=address)
    return listener


def _attend(env: MutableMapping[str, str], world: int, seconds: float) -> None:
    host = _host_name(env)
    candidates = [(host, port) for port in _ports(env)]
    meeting = attend_meeting(
        candidates,
        {},
        number=int(env["RANK"]),
        expected=world,
        token=_token(env),
        seconds=seconds,
        origin="MASTER_ADDR=",
    )
    _settle(env, address=meeting.address, port=meeting.port, own=meeting.own_address)


def _settle(env: MutableMapping[str, str], *, address: str, port: int, own: str | None) -> None:
    env["MASTER_ADDR"], env["MASTER_PORT"] = address, str(port)
    # Left to itself, gloo takes the address that this machine's own name has: where that is a loopback
    # address, or none at all, processes of other machines wait for it until their time-out.
    interface = None if env.get("GLOO_SOCKET_IFNAME") else interface_of(own)
    if interface is not None:
        env["GLOO_SOCKET_IFNAME"] = interface


def _reach_agent(env: MutableMapping[str, str], seconds: float) -> None:
    """See that the agents' store can be reached: torch itself asks for a name that nobody knows for ever."""
    host, port = env["MASTER_ADDR"], _port(env)
    until, trouble = time.monotonic() + seconds, ""
    while True:
        for address in addresses_of(host, seconds=seconds, origin="MASTER_ADDR="):
            try:
                left = max(PAUSE, min(ANSWER, until - time.monotonic()))
                with socket.create_connection((address, port), timeout=left) as connection:
                    own = str(connection.getsockname()[0])
            except OSError as error:
                trouble = error.strerror or "it does not answer"
                continue
            if _on_one_machine(env):
                own = LOOPBACK
            elif is_loopback(own) and not is_loopback(host):
                own = address_outside() or own
            _settle(env, address=address, port=port, own=own)
            return
        if time.monotonic() >= until:
            what = f"error: process {env.get('RANK')} on {socket.gethostname()} cannot reach its launcher's "
            what += f"store at {host}:{port}: {trouble} ({seconds:g} s)"
            hint = "see whether a firewall is in between, and the first node's launcher runs"
            raise Ended("RENDEZVOUS", what, hint=hint)
        time.sleep(PAUSE)


def _listen(env: Mapping[str, str], seconds: float) -> socket.socket:
    """A socket that only those can reach who have to."""
    host = _host_name(env)
    found = addresses_of(host, seconds=seconds, origin="MASTER_ADDR=")
    outside = [address for address in found if not is_loopback(address)]
    # Many a machine's own name leads it to its loopback address, where the others cannot reach it.
    addresses = [host] if is_loopback(host) else outside or [""]
    until, asked = time.monotonic() + min(seconds, LEAVING), False
    while True:
        taken = []
        for port in _ports(env):
            for address in addresses:
                try:
                    family = socket.AF_INET6 if ":" in address else socket.AF_INET
                    return socket.create_server((address, port), family=family, backlog=4096)
                except OSError as error:
                    if error.errno == errno.EADDRINUSE:
                        taken.append((address, port))
                    elif error.errno != errno.EADDRNOTAVAIL:
                        raise _cannot_listen(host, port, error.strerror or str(error)) from None
        if not taken:
            what = f"error: MASTER_ADDR={env['MASTER_ADDR']} ({', '.join(addresses)}) is no address of "
            what += f"{socket.gethostname()}, where process 0 runs"
            raise Ended("RENDEZVOUS", what, hint="give the address of process 0's machine to all processes")
        if not asked:
            _ask_for_a_second_zero(env, taken[0])
            asked = True
        if time.monotonic() >= until:
            raise _cannot_listen(host, taken[0][1], f"it is taken by {owner_of_port(taken[0][1])}")
        time.sleep(PAUSE)


def _ask_for_a_second_zero(env: Mapping[str, str], place: tuple[str, int]) -> None:
    """UserError where it is another process 0 of this very start that has the port."""
    with contextlib.suppress(Ended):
        world = int(env["WORLD_SIZE"])
        attend_meeting(
            [(place[0] or LOOPBACK, place[1])], {}, number=0, expected=world, token=_token(env), seconds=0.5
        )


def _cannot_listen(host: str, port: int, why: str) -> Ended:
    what = f"error: process 0 cannot listen at {host}:{port}: {why}"
    return Ended("RENDEZVOUS", what, hint="give another port to all processes: MASTER_PORT, or --port")


def _given_listener(env: MutableMapping[str, str]) -> socket.socket | None:
    """The socket that the launcher has made; no process that this one starts is to see it."""
    text = env.pop("LOCKSTEP_LISTENER", "")
    if not text:
        return None
    try:
        listener = socket.socket(fileno=int(text))
        port = listener.getsockname()[1]
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except (ValueError, OSError, IndexError, AssertionError):
        what = f"LOCKSTEP_LISTENER={text[:80]!r} is no socket that listens"
        raise UserError(what, mend="unset it: lockstep launch sets it for process 0", code="USAGE") from None
    listener.set_inheritable(False)
    env["MASTER_PORT"] = str(port)
    return listener


def _host_name(env: Mapping[str, str]) -> str:
    """Where process zero is; the loopback address where all are on one machine."""
    host = env["MASTER_ADDR"]
    return LOOPBACK if _on_one_machine(env) or host == "localhost" else host


def _on_one_machine(env: Mapping[str, str]) -> bool:
    return env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]


def _port(env: Mapping[str, str]) -> int:
    port = int(env["MASTER_PORT"])
    if not port:
        mend = "give one that is free on process 0's machine; lockstep launch finds one itself"
        raise UserError("MASTER_PORT=0 is a port that nobody knows", mend=mend, code="USAGE")
    return port


def _step(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Job and step of srun where its number alone has given the port: nobody has chosen it."""
    try:
        job, step = int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"])
    except (KeyError, ValueError):
        return None
    return (job, step) if _port(env) == step_port(job, step) else None


def _ports(env: Mapping[str, str]) -> Sequence[int]:
    """Where process zero may be, in the order in which it tries."""
    step = _step(env)
    if step is None:
        return [_port(env)]
    return [step_port(*step, attempt=attempt) for attempt in range(ATTEMPTS)]


def _token(env: Mapping[str, str]) -> str:
    """What tells the processes of this start from those of any other."""
    if env.get("LOCKSTEP_TOKEN"):
        return env["LOCKSTEP_TOKEN"]
    step = _step(env)
    start = f"port {env['MASTER_PORT']}" if step is None else f"step {step} {env.get('SLURM_RESTART_COUNT')}"
    return f"lockstep {start}"


def _patience(env: Mapping[str, str]) -> float:
    text = env.get("LOCKSTEP_WAIT") or str(WAIT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 86400:
        what = f"LOCKSTEP_WAIT={text[:80]!r} is no number of seconds"
        raise UserError(what, mend="give one, or unset it for 15", code="USAGE")
    return seconds
