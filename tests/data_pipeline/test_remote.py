"""Transfers from a real server on loopback, well-behaved and not."""

from __future__ import annotations

import random
import socket
import threading
import time

import pytest

from data_pipeline.fault import UserError
from data_pipeline.transfer import Failure, Patience, StoppedError, Wanted, transfer
from data_pipeline.web import web_body

SIZE = 300_000
PATIENCE = Patience(tries=3, seconds=0.5, piece=80_000, pause=0.01)


@pytest.fixture
def content():
    return random.Random(0).randbytes(SIZE)


@pytest.fixture
def server(serve, tmp_path, content):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.tar").write_bytes(content)
    return serve(tmp_path / "served")


def fetched(server, *, size=SIZE, start=b"", limit=1 << 30, patience=PATIENCE, path="/a.tar"):
    whole = bytearray(start)
    transfer(
        Wanted(server.url + path, size, limit), web_body, whole.extend, start=len(start), patience=patience
    )
    return whole


def fault(server, **options):
    with pytest.raises(UserError) as caught:
        fetched(server, **options)
    assert f"{server.url}/a.tar" in caught.value.what
    return caught.value


def behave(server, **manners):
    server.behave("/a.tar", **manners)


@pytest.mark.parametrize("size", [SIZE, None])
def test_a_file_comes_in_one_request_whether_its_size_is_known_or_not(server, content, size):
    assert fetched(server, size=size) == content
    assert server.asked("/a.tar") == [0]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("start", [1, 100_000, SIZE - 1])
def test_a_transfer_goes_on_where_another_ended_whether_the_server_has_ranges_or_not(
    server, content, start, ranges
):
    behave(server, ranges=ranges)
    assert fetched(server, start=content[:start]) == content
    assert server.asked("/a.tar") == [start if ranges else 0]


def test_what_is_whole_already_is_not_asked_for(server, content):
    assert fetched(server, start=content) == content
    assert server.log == []


@pytest.mark.parametrize("size", [SIZE, None])
def test_cut_connections_cost_no_byte_twice(server, content, size):
    behave(server, drop_after=100_000, times=2)
    assert fetched(server, size=size) == content
    assert server.asked("/a.tar") == [0, 100_000, 200_000]


def test_cut_connections_that_bring_the_transfer_further_are_no_vain_tries(server, content):
    behave(server, drop_after=20_000)
    assert fetched(server) == content
    assert len(server.asked("/a.tar")) == SIZE / 20_000 > PATIENCE.tries


def test_cut_connections_that_bring_next_to_nothing_are_given_up(server):
    behave(server, drop_after=5_000)
    error = fault(server)
    assert error.code == "DATA"
    assert "the connection broke" in error.what
    assert f"15000 of {SIZE} bytes came in 3 tries" in error.what


def test_a_server_without_ranges_whose_connection_always_breaks_is_given_up(server):
    behave(server, drop_after=100_000, ranges=False)
    error = fault(server)
    assert f"100000 of {SIZE} bytes came in 4 tries" in error.what


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again_until_it_answers(server, content, status):
    behave(server, status=status, times=2)
    assert fetched(server) == content
    assert server.asked("/a.tar") == [-1, -1, 0]


def test_a_server_that_stays_busy_is_given_up_with_its_status(server):
    behave(server, status=503)
    error = fault(server)
    assert error.code == "DATA"
    assert f"HTTP status 503 Service Unavailable; 0 of {SIZE} bytes came in 3 tries" in error.what


def test_a_server_says_how_long_to_wait(server, content):
    behave(server, status=429, retry_after="1", times=1)
    began = time.monotonic()
    assert fetched(server) == content
    assert time.monotonic() - began > 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_plain_no_is_taken_at_once(server, status):
    behave(server, status=status)
    error = fault(server)
    assert error.code == "DATA"
    assert f"HTTP status {status}" in error.what
    assert "in 1 try" in error.what
    assert len(server.log) == 1


def test_a_content_length_that_is_too_short_is_no_end(server, content):
    behave(server, claim=100_000, times=1)
    assert fetched(server) == content
    assert server.asked("/a.tar") == [0, 100_000]


def test_a_content_length_that_is_too_long_is_refused_before_the_body(server):
    behave(server, claim=SIZE + 1)
    error = fault(server)
    assert f"there it has {SIZE + 1} bytes; 0 of {SIZE} bytes came in 1 try" in error.what


def test_a_promise_of_more_than_comes_is_no_whole_file(server):
    behave(server, claim=SIZE + 1)
    assert f"there it has {SIZE} bytes" in fault(server, size=None).what


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_is_smaller_on_the_server_is_an_error_that_says_so(server, ranges):
    behave(server, ranges=ranges)
    error = fault(server, size=SIZE + 10)
    assert error.code == "DATA"
    assert f"{SIZE} of {SIZE + 10} bytes" in error.what
    assert len(server.log) <= PATIENCE.tries + 1


def test_a_file_that_is_larger_than_it_may_be_is_not_taken_to_the_end(server):
    assert "there it has more bytes" in fault(server, size=None, limit=1000).what
    assert f"there it has {SIZE} bytes" in fault(server, size=1000).what


TRICKLES = {
    "1 byte": {"bytes_a_second": 10},
    "some": {"bytes_a_second": 60_000},
    "head": {"slow_header": True},
}


@pytest.mark.parametrize("trickle", TRICKLES)
def test_a_trickle_is_a_clear_error_and_no_hang(server, trickle):
    behave(server, **TRICKLES[trickle])
    began = time.monotonic()
    error = fault(server)
    assert "0.5 s" in error.what
    assert "in 3 tries" in error.what
    assert time.monotonic() - began < 6


def test_a_server_that_takes_the_connection_and_says_nothing_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/a.tar"
        with pytest.raises(UserError, match=r"0\.5 s; 0 of 10 bytes came in 3 tries"):
            transfer(Wanted(url, 10, 10), web_body, bytearray().extend, patience=PATIENCE)


def test_no_server_at_all_is_an_error_with_the_reason():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}/a.tar"
    with pytest.raises(UserError, match=r"no connection: .*refused; 0 of 10 bytes came in 3 tries"):
        transfer(Wanted(url, 10, 10), web_body, bytearray().extend, patience=PATIENCE)


def test_a_host_that_no_name_server_could_know_is_an_error_at_once():
    with pytest.raises(UserError, match="no host can have this name"):
        transfer(Wanted(f"http://{'a' * 70}/x", 1, 1), web_body, print, patience=PATIENCE)


@pytest.mark.parametrize(
    "location",
    ["http://localhost:{port}/b.tar", "https://127.0.0.1:{port}/a.tar", "file:///etc/passwd", "ftp://h/x"],
)
def test_a_redirect_to_another_host_or_scheme_is_refused_unopened(server, location):
    (server.root / "b.tar").write_bytes(b"x")
    behave(server, status=302, location=location.format(port=server.server_address[1]))
    error = fault(server)
    assert error.code == "UNSAFE"
    assert location.format(port=server.server_address[1]) in error.what
    assert [request.path for request in server.log] == ["/a.tar"]


def test_a_redirect_within_the_host_is_followed_with_its_range(server, content):
    (server.root / "moved.tar").write_bytes(content)
    behave(server, status=302, location="/moved.tar")
    assert fetched(server, start=content[:1000]) == content
    assert server.asked("/moved.tar") == [1000]


def test_a_redirect_in_a_circle_ends(server):
    behave(server, status=302, location="/a.tar")
    assert fault(server).code == "UNSAFE"


def test_a_transfer_that_is_not_wanted_any_more_ends_between_tries(server):
    behave(server, status=500)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    patience = Patience(tries=1000, pause=30.0)
    began = time.monotonic()
    with pytest.raises(StoppedError):
        transfer(
            Wanted(f"{server.url}/a.tar", SIZE, SIZE),
            web_body,
            bytearray().extend,
            patience=patience,
            stop=stop,
        )
    assert time.monotonic() - began < 5


def test_pauses_double_and_differ_by_file_but_not_by_time(monkeypatch):
    pauses = []
    monkeypatch.setattr("data_pipeline.transfer.time.sleep", pauses.append)

    def body(*_):
        raise Failure("no")
        yield b""

    for name in ["a", "a", "b"]:
        with pytest.raises(UserError):
            transfer(Wanted(name, 1, 1), body, print, patience=Patience(tries=6, pause=1.0))
    first, again, other = pauses[:5], pauses[5:10], pauses[10:]
    assert first == again != other
    for number, pause in enumerate(first):
        assert 0.5 * 2**number <= pause < 1.5 * 2**number
