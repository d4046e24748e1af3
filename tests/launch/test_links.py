"""What launchers of several machines tell one another, here over pairs of sockets."""

from __future__ import annotations

import socket
import threading

import pytest

from launch.agreement import Verdict, agree, hear_verdict
from launch.attempts import Outcome
from launch.links import Links, Node
from launch.stop_signals import StopSignals

FINE, KILLED = Outcome(0), Outcome(70, "CRASH", "process 1 was killed", 1)


@pytest.fixture
def three():
    """The links of node 0, of node 1, and of node 2."""
    pairs = [socket.create_connection(server.getsockname()) for server in (listener(), listener())]
    accepted = [server.accept()[0] for server in SERVERS]
    zero = Links(
        0, [Node(number, f"node {number} on h{number}", one) for number, one in enumerate(accepted, 1)]
    )
    others = [Links(number, [Node(0, "node 0 at h0", one)]) for number, one in enumerate(pairs, 1)]
    with zero, others[0], others[1]:
        yield zero, *others
    while SERVERS:
        SERVERS.pop().close()


SERVERS = []


def listener():
    SERVERS.append(socket.create_server(("127.0.0.1", 0)))
    return SERVERS[-1]


def test_a_failure_is_told_to_all_and_the_first_one_counts(three):
    zero, one, two = three
    one.failing()
    assert zero.failed()
    assert two.failed()
    assert two.failures == [0]
    two.failing()
    assert zero.failed()
    assert zero.failures == [1, 2]


def test_a_stop_is_told_to_all(three):
    zero, one, two = three
    assert not zero.stop()
    two.stopping()
    assert zero.stop()
    zero.stopping()
    assert one.stop()
    assert not any(links.failed() for links in three)


def test_a_launcher_that_is_gone_has_failed_unless_it_has_said_how_it_ended(three):
    zero, one, two = three
    two.tell({"over": FINE._asdict()})
    zero.hear()
    for links in (one, two):
        links.__exit__()
    assert zero.failed()
    assert (zero.failures, sorted(zero.lost)) == ([1], [1, 2])
    assert zero.files() == []


@pytest.mark.parametrize("message", [b"[]\n", b"\xff\n", b'{"over": 3\n'])
def test_who_says_what_nobody_understands_is_lost(three, message):
    zero, one, _ = three
    one._nodes[0].connection.sendall(message)
    assert zero.failed()
    assert zero.lost == [1]


def concluded(three, outcomes, *, failing=(), again=None):
    """The verdict as each of the three has it."""
    zero, *others = three
    verdicts = {}

    def follow(links, outcome):
        verdicts[links] = hear_verdict(links, signals, outcome)

    with StopSignals() as signals:
        for number in failing:
            three[number].failing()
            zero.hear()
        threads = [
            threading.Thread(target=follow, args=(links, outcome))
            for links, outcome in zip(others, outcomes[1:], strict=True)
        ]
        for thread in threads:
            thread.start()
        verdict = agree(zero, signals, outcomes[0])._replace(again=again)
        zero.tell({"verdict": verdict.as_json()})
        for thread in threads:
            thread.join(20)
    return [verdict, *(verdicts[links] for links in others)]


@pytest.mark.parametrize(
    ("outcomes", "failing", "ends"),
    [
        ([FINE, FINE, FINE], [], (0, 0)),
        ([FINE, Outcome(75, "STOPPED"), FINE], [], (75, 1)),
        ([Outcome(70, "CRASH", "is gone", 1), KILLED, Outcome(71, "HANG")], [1, 0, 2], (70, 1)),
        ([Outcome(70, "CRASH"), Outcome(71, "HANG"), Outcome(3, "CRASH")], [2, 1, 0], (3, 2)),
    ],
)
def test_all_machines_end_alike(three, outcomes, failing, ends):
    verdicts = concluded(three, outcomes, failing=failing, again=ends[0] > 69)
    assert [(one.outcome.exit_code, one.node) for one in verdicts] == [ends] * 3
    assert [one.again for one in verdicts] == [ends[0] > 69] * 3


def test_a_machine_that_is_lost_is_the_reason_and_is_named(three):
    zero, one, two = three
    two.__exit__()
    one.tell({"over": KILLED._asdict()})
    with StopSignals() as signals:
        assert zero.failed()
        verdict = agree(zero, signals, KILLED)
    assert (verdict.outcome.exit_code, verdict.node) == (69, 2)
    assert verdict.outcome.what.startswith("node 2 on h2 is gone")


def test_without_node_zero_nobody_has_decided(three):
    zero, one, _ = three
    zero.__exit__()
    with StopSignals() as signals:
        verdict = hear_verdict(one, signals, FINE)
    assert verdict == Verdict(one.gone(0), 0, "node 0 at h0", None)


def test_what_node_zero_said_last_is_heard_though_it_has_left(three):
    zero, one, two = three
    one.tell({"over": KILLED._asdict()})
    zero.hear()
    zero.tell({"verdict": Verdict(KILLED, 1, "node 1 on h1", True).as_json()})
    leaves = threading.Thread(target=zero.part)
    leaves.start()
    with StopSignals() as signals:
        verdict = hear_verdict(one, signals, KILLED)
    assert (verdict.outcome.exit_code, verdict.again) == (70, True)
    assert leaves.is_alive()
    for links in (one, two):
        links.__exit__()
    leaves.join(2)
    assert not leaves.is_alive()
