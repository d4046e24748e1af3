"""Meetings on real sockets: who is told what, how soon, and what strangers can do about it."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.interfaces import address_outside, addresses_of, interface_of, is_loopback
from launch.meeting import NODES, Told, attend_meeting, host_meeting
from launch.members import introduction
from launch.wire import Line, proof, send_line
from training.config import UserError
from training.vigil.ending import Ended

OTHER = "another start"
LIMIT = 20.0  # seconds that none of these meetings needs


class Party:
    """A host and those who come, each in a thread; what each returned or raised."""

    def __init__(self, *, expected=3, seconds=LIMIT, **options):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self._pool = ThreadPoolExecutor(16)
        self._expected, self._seconds = expected, seconds
        arguments = {"expected": expected, "token": "secret", "seconds": seconds, **options}
        self.began = time.monotonic()
        self.host = self._pool.submit(host_meeting, self.listener, {"name": "zero"}, **arguments)

    def come(self, number, **changed):
        arguments = {"expected": self._expected, "token": "secret", "seconds": self._seconds, **changed}
        candidates = arguments.pop("candidates", [("127.0.0.1", self.port)])
        mine = arguments.pop("mine", {"name": f"number {number}"})
        return self._pool.submit(attend_meeting, candidates, mine, number=number, **arguments)

    def end(self):
        self.listener.close()
        self._pool.shutdown(wait=True)

    @property
    def seconds(self):
        return time.monotonic() - self.began


@pytest.fixture
def party():
    parties = []

    def start(**options):
        parties.append(Party(**options))
        return parties[-1]

    yield start
    for one in parties:
        one.end()


def test_all_come_and_hear_what_was_made_of_what_they_said(party):
    meeting = party(judge=lambda abouts: {"names": [about["name"] for about in abouts]})
    guests = [meeting.come(2), meeting.come(1)]
    host = meeting.host.result()
    assert host.verdict == {"names": ["zero", "number 1", "number 2"]}
    assert [member.number for member in host.members] == [0, 1, 2]
    assert [member.about["host"] for member in host.members] == [socket.gethostname()] * 3
    for guest in guests:
        assert guest.result().verdict == host.verdict
        assert (guest.result().address, guest.result().port) == ("127.0.0.1", meeting.port)
    assert meeting.seconds < LIMIT / 2


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(1, 6)), st.integers(0, 5))
def test_in_whatever_order_they_come_members_are_listed_by_number(order, late):
    meeting = Party(expected=6)
    try:
        guests = []
        for index, number in enumerate(order):
            time.sleep(0.02 * (index == late))
            guests.append(meeting.come(number))
        members = meeting.host.result().members
        assert [member.about["number"] for member in members] == list(range(6))
        assert all(guest.result().verdict == {} for guest in guests)
    finally:
        meeting.end()


def test_one_that_comes_late_is_waited_for(party):
    meeting = party(expected=2)
    time.sleep(1.5)
    meeting.come(1).result()
    assert meeting.host.result().members[1].number == 1


def test_a_host_that_comes_late_is_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as place:
        address = place.getsockname()
    with ThreadPoolExecutor() as pool:
        arguments = {"expected": 2, "token": "secret", "seconds": LIMIT}
        guest = pool.submit(attend_meeting, [address], {}, number=1, **arguments)
        time.sleep(1)
        with socket.create_server(address) as listener:
            host_meeting(listener, {}, **arguments)
        assert guest.result().address == "127.0.0.1"


def test_those_who_are_missing_are_named_to_all_at_the_limit(party):
    meeting = party(expected=5, seconds=1.5)
    guests = [meeting.come(1), meeting.come(3)]
    with pytest.raises(Ended, match=r"error: 3 of 5 processes came within 1.5 seconds: missing RANK 2, 4"):
        meeting.host.result()
    for guest in guests:
        with pytest.raises(Told, match="missing RANK 2, 4") as told:
            guest.result()
        assert told.value.code == "RENDEZVOUS"
    assert 1.5 <= meeting.seconds < 1.5 + 4


def test_fewer_are_enough_where_that_was_said(party):
    meeting = party(expected=4, seconds=1, least=2, kind=NODES)
    guest = meeting.come(3, kind=NODES)
    assert [member.number for member in meeting.host.result().members] == [0, 3]
    assert guest.result().verdict == {}


@pytest.mark.parametrize(
    ("number", "expected", "words"),
    [
        (1, 3, r"two processes have RANK 1: pid \d+ on \S+ and pid \d+ on \S+"),
        (0, 3, r"two processes have RANK 0: pid \d+ on \S+ and pid \d+ on \S+"),
        (3, 3, r"process 3 on \S+: RANK counts from 0, and there are 3 processes"),
        (2, 4, r"process 2 on \S+ was started for 4 processes \(WORLD_SIZE\), process 0 on \S+ for 3"),
    ],
)
def test_what_cannot_be_is_told_to_all_at_once(party, number, expected, words):
    meeting = party()
    first = meeting.come(1, mine={"pid": 1})
    second = meeting.come(number, expected=expected, mine={"pid": 2})
    for one in (meeting.host, first, second):
        with pytest.raises(UserError, match=words) as error:
            one.result()
        assert error.value.code == "USAGE"
    assert meeting.seconds < LIMIT / 2


def test_what_the_judge_refuses_is_raised_at_everybody(party):
    def judge(abouts):
        raise UserError(f"{abouts[1]['name']} is not wanted", mend="send another", code="CONFIG")

    meeting = party(expected=2, judge=judge)
    for one in (meeting.come(1), meeting.host):
        with pytest.raises(UserError, match="number 1 is not wanted") as error:
            one.result()
        assert (error.value.code, error.value.mend) == ("CONFIG", "send another")


def test_one_that_goes_again_before_all_are_there_is_missing(party):
    meeting = party(seconds=1.5)
    with socket.create_connection(("127.0.0.1", meeting.port)) as connection:
        line = Line(connection)
        send_line(connection, {"nonce": "a"})
        proven = proof("secret", "guest", line.wait(until=time.monotonic() + LIMIT)["nonce"])
        send_line(connection, {"proof": proven, "about": introduction({}, 1, 3)})
        time.sleep(0.5)
    meeting.come(2)
    with pytest.raises(Ended, match=r"2 of 3 processes .*: missing RANK 1$"):
        meeting.host.result()


def flood(connection):
    while True:
        connection.sendall(b"x" * (1 << 20))


def drip(connection):
    while True:
        connection.sendall(b"{")
        time.sleep(0.05)


def wrong_token(connection):
    attend_meeting([connection.getpeername()], {}, number=1, expected=3, token=OTHER, seconds=1)


STRANGERS = {
    "garbage": lambda connection: connection.sendall(b"GET / HTTP/1.0\r\n\r\n\0\xff"),
    "no object": lambda connection: connection.sendall(b"[1]\n" * 9),
    "half a letter": lambda connection: connection.sendall(b'{"nonce": "\\ud800"}\n{"proof": "\\ud800"}\n'),
    "depth": lambda connection: connection.sendall(b'{"nonce":' * 6000 + b"\n"),
    "no number": lambda connection: connection.sendall(b'{"nonce": "a"}\n{"proof": "b", "about": {}}\n'),
    "flood": flood,
    "drip": drip,
    "wrong token": wrong_token,
}


def test_strangers_change_nothing(party):
    meeting = party(judge=lambda abouts: {"heard": len(abouts)})

    def intrude(act):
        try:
            with socket.create_connection(("127.0.0.1", meeting.port)) as connection:
                act(connection)
                connection.settimeout(2)
                while connection.recv(1 << 16):
                    pass
        except (OSError, Ended):
            return

    intruders = [threading.Thread(target=intrude, args=(act,), daemon=True) for act in STRANGERS.values()]
    for intruder in intruders:
        intruder.start()
    time.sleep(1.5)
    assert not meeting.host.done()
    guests = [meeting.come(1), meeting.come(2)]
    assert meeting.host.result().verdict == {"heard": 3}
    assert [guest.result().verdict for guest in guests] == [{"heard": 3}] * 2
    assert meeting.seconds < LIMIT / 2


def test_a_crowd_that_says_nothing_keeps_nobody_out(party):
    meeting = party(expected=2)
    crowd = [socket.create_connection(("127.0.0.1", meeting.port)) for _ in range(300)]
    meeting.come(1).result()
    assert meeting.host.result().members[1].number == 1
    for one in crowd:
        one.close()


def test_of_several_places_the_one_with_the_right_secret_is_found(party):
    other, silent = party(token=OTHER), socket.create_server(("127.0.0.1", 0))
    meeting = party(expected=2)
    places = [("127.0.0.1", port) for port in (other.port, silent.getsockname()[1], meeting.port)]
    assert meeting.come(1, candidates=places).result().port == meeting.port
    assert not other.host.done()
    silent.close()
    other.come(1, token=OTHER)
    other.come(2, token=OTHER)
    other.host.result()


def test_a_host_that_cannot_be_reached_is_named_with_what_is_in_the_way():
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(Ended) as error:
        attend_meeting([("127.0.0.1", port)], {}, number=1, expected=2, token="", seconds=1)
    words = f"cannot reach process 0 at 127.0.0.1:{port}: Connection refused (1 s)"
    assert error.value.what == f"error: process 1 on {socket.gethostname()} {words}"
    assert 1 <= time.monotonic() - began < 3


def test_a_name_that_nobody_knows_is_given_up_before_the_limit(monkeypatch):
    monkeypatch.setattr("launch.interfaces.UNKNOWN", 1)
    began = time.monotonic()
    with pytest.raises(Ended, match=r"error: MASTER_ADDR=no-such-host\.invalid: no such host"):
        attend_meeting(
            [("no-such-host.invalid", 1)],
            {},
            number=1,
            expected=2,
            token="",
            seconds=60,
            origin="MASTER_ADDR=",
        )
    assert time.monotonic() - began < 8


def test_connections_can_be_kept_with_all_that_is_said_on_them(party):
    meeting = party(expected=2, keep=True)
    guest = meeting.come(1, keep=True).result().members[0].connection
    host = meeting.host.result().members[1].connection
    host.sendall(b"behind the verdict\n")
    assert guest.recv(100) == b"behind the verdict\n"
    guest.close()
    assert host.recv(100) == b""
    host.close()


def test_the_secret_is_never_said():
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:
        arguments = {"number": 1, "expected": 2, "token": "a long secret", "seconds": 0.5}
        guest = pool.submit(attend_meeting, [listener.getsockname()], {}, **arguments)
        connection, _ = listener.accept()
        said = connection.recv(1 << 16)
        connection.sendall(json.dumps({"proof": "made up", "nonce": "0"}).encode() + b"\n")
        connection.settimeout(5)
        said += connection.recv(1 << 16)
        assert said.startswith(b'{"nonce"')
        assert b"secret" not in said
        assert b"about" not in said
        with pytest.raises(Ended):
            guest.result()


def test_addresses_of_this_machine():
    assert addresses_of("127.0.0.1", seconds=5) == ["127.0.0.1"]
    assert all(map(is_loopback, ("127.0.0.1", "127.0.1.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("10.0.0.1", "node1", "")))
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None
    outside = address_outside()
    assert outside is None or interface_of(outside) not in {None, "lo"}
    with pytest.raises(Ended):
        addresses_of("x" * 80, seconds=0.1)
