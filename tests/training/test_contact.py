"""Connections between the vigils of a job: who is silent, lost or a stranger, on real sockets."""

from __future__ import annotations

import socket
import time

import pytest

from training.vigil.contact import LOST, Contact, lost_words
from training.vigil.siblings import Sibling, introduce


@pytest.fixture
def pair(monkeypatch):
    """Process zero's end and process one's, on one machine."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    zero, one = Contact(), Contact()
    port = zero.listen()
    one.connect(introduce(0, stacks=-1, port=port, token=zero.token), rank=1)
    one.send({"beats": 1})
    assert until(zero, lambda heard: heard == [(1, {"beats": 1})])
    yield zero, one
    for end in (zero, one):
        for file in end.files():
            socket.socket(fileno=file).close()


def until(contact, good, *, seconds=10, act=lambda: None):
    """Whether all that it has heard is `good` in time."""
    heard, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        act()
        heard += contact.receive(set(contact.files()))
        if good(heard):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("patience", [0.5, 100.0])
def test_news_are_kept_from_a_process_that_is_silent_or_its_full_kernel_would_seem_to_be_lost(
    pair, monkeypatch, patience
):
    monkeypatch.setattr("training.vigil.contact.LOST_AFTER", 1)
    monkeypatch.setattr("training.vigil.contact.SILENT", patience)
    zero, _ = pair
    lost = until(
        zero,
        lambda heard: heard == [(1, LOST)],
        seconds=6,
        act=lambda: zero.send({"beats": "x" * 30000}, news=True),
    )
    assert lost == (patience > 1)


def test_how_the_job_ends_is_said_to_silent_ones_too(pair, monkeypatch):
    monkeypatch.setattr("training.vigil.contact.SILENT", 0.1)
    zero, one = pair
    time.sleep(0.2)
    zero.send({"beats": 2}, news=True)
    zero.send({"ending": {}})
    assert until(one, lambda heard: heard == [(0, {"ending": {}})])


def test_a_stranger_who_writes_half_a_letter_is_sent_away_and_the_others_are_heard(pair):
    zero, one = pair
    with socket.create_connection(("127.0.0.1", zero._listener.getsockname()[1])) as stranger:
        stranger.sendall(b'{"token": "\\ud800", "rank": 1}\n')
        stranger.settimeout(0.01)
        until(zero, lambda heard: False, seconds=0.5)
        assert stranger.recv(1) == b""
    one.send({"beats": 2})
    assert until(zero, lambda heard: heard == [(1, {"beats": 2})])


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (
            [(1, "h2")],
            "process 1 on h2 has not been heard of for 10 seconds: its host or the network is gone",
        ),
        (
            [(2, "h2"), (3, "h2")],
            "processes 2 and 3 on h2 have not been heard of for 10 seconds: "
            "their host or the network is gone",
        ),
        (
            [(1, "h2"), (2, "h3"), (3, "h3"), (4, "h3")],
            "process 1 on h2 and processes 2, 3 and 4 on h3 have not been heard of for 10 seconds: "
            "their hosts or the network are gone",
        ),
    ],
)
def test_those_who_are_lost_are_named_with_their_hosts(places, words):
    lost = [Sibling(rank, host, "", 1, -1, 0, "") for rank, host in places]
    assert lost_words(lost) == words
