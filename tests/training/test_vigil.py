"""The parts of the watch over a job: connections, ends, stacks, the pace, and who stands still."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.vigil.contact import Contact
from training.vigil.ending import Failure
from training.vigil.pace import TICK, Pace
from training.vigil.pid_files import PidFiles
from training.vigil.place import Place
from training.vigil.siblings import how_it_ended, introduce, is_stopped
from training.vigil.verdict import Sight, stands_still

KERNEL = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
linux = pytest.mark.skipif(sys.platform != "linux", reason="pidfd and /proc are Linux's")

WAITING = Sight(answers=True, step=6, waits=True)


@pytest.mark.parametrize(
    ("sights", "ranks"),
    [
        ({0: WAITING, 1: Sight(answers=True, step=6)}, [1]),
        ({0: WAITING, 1: Sight(answers=True, step=5, waits=True)}, [1]),
        ({0: WAITING, 1: Sight(answers=False, step=7)}, [1]),
        ({0: Sight(answers=True, step=6), 1: Sight(answers=True, stopped=True, step=6)}, [1]),
        ({0: WAITING, 1: Sight(answers=True)}, [1]),
        ({0: WAITING, 1: WAITING}, []),
        ({0: WAITING}, [0]),
    ],
)
def test_who_the_others_wait_for_is_told_by_silence_then_by_steps_then_by_what_it_does(sights, ranks):
    assert stands_still(sights) == ranks


@given(
    st.lists(st.builds(Sight, answers=st.booleans(), step=st.integers(0, 3), waits=st.booleans()), min_size=1)
)
def test_who_does_not_answer_is_always_named_and_nobody_is_made_up(sights):
    known = dict(enumerate(sights))
    named = stands_still(known)
    assert set(named) <= known.keys()
    silent = [rank for rank, sight in known.items() if not sight.answers]
    assert not silent or named == silent


@linux
@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by signal 9 (SIGKILL)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by signal 11 (SIGSEGV)"),
        ("os._exit(5)", "ended with exit code 5"),
        ("os._exit(143)", ""),
    ],
)
def test_how_a_process_ended_is_read_as_soon_as_the_kernel_tells(code, words):
    process = subprocess.Popen([sys.executable, "-c", f"import os, signal; input(); {code}"], stdin=-1)
    sibling = introduce(1, stacks=-1)._replace(pid=process.pid)
    near = PidFiles([sibling])
    assert near.wait([], seconds=0) == set()
    assert near.alive == [sibling]
    process.stdin.write(b"\n")
    process.stdin.close()
    file = os.pidfd_open(process.pid)
    ((who, how),) = near.ended(near.wait([], seconds=30))
    assert who == sibling
    assert words in how
    assert bool(words) == bool(how)
    process.wait()
    assert how_it_ended(process.pid) == "is gone"
    assert how_it_ended(process.pid, file) == (how if KERNEL >= (6, 15) else "is gone")
    os.close(file)
    assert near.alive == []
    assert PidFiles([sibling]).ended(set()) == [(sibling, "is gone")]


@pytest.fixture
def star(monkeypatch):
    """Process zero's contact and that of another one."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    hub, spoke = Contact(), Contact()
    port = hub.listen()
    zero = introduce(0, stacks=-1, port=port, token=hub.token)
    spoke.connect(zero, rank=1)
    return hub, spoke, zero


def heard(contact):
    """What comes within a moment."""
    end, found = time.monotonic() + 5, []
    while not found and time.monotonic() < end:
        found = contact.receive(set(contact.files()))
    return found


def test_both_sides_hear_each_other_and_learn_of_an_end(star):
    hub, spoke, _ = star
    spoke.send({"beats": 3})
    assert heard(hub) == [(1, {"beats": 3})]
    hub.send({"beats": 5})
    hub.send({"ending": {}})
    assert heard(spoke) == [(0, {"beats": 5}), (0, {"ending": {}})]
    for file in spoke.files():
        os.close(os.dup(file))  # a copy that is closed means nothing
    next(iter(spoke._peers.values())).socket.close()
    assert heard(hub) == [(1, None)]


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"token": "x", "rank": 1}\n',
        b'{"token": null, "rank": 1}\n',
        b"[" * 70_000,
        b"[" * 60_000 + b"\n",
        b"\xff\xfe\n",
        b"",
    ],
)
def test_a_stranger_at_the_door_is_sent_away_and_harms_nobody(star, said):
    hub, spoke, zero = star
    with socket.create_connection(("127.0.0.1", zero.port)) as stranger:
        stranger.sendall(said)
        if not said:
            stranger.shutdown(socket.SHUT_WR)
        spoke.send({"beats": 1})
        assert heard(hub) == [(1, {"beats": 1})]
        stranger.settimeout(0.01)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            assert hub.receive(set(hub.files())) == []
            try:
                assert stranger.recv(1) == b""
                break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("the stranger may stay")


def looks(pace, count, *, every=TICK):
    now = time.monotonic()
    for number in range(1, count + 1):
        pace.look(now + number * every)
    return pace.silence


def test_silence_begins_with_work_and_ends_with_every_sign_of_progress():
    place = Place()
    pace = Pace(place, compiles=False)
    assert looks(pace, 10) == 0, "set-up may take its time"
    place.at(step=0)
    looks(pace, 1)
    assert looks(pace, 10) > 3
    place.at()
    looks(pace, 1)
    assert pace.silence == 0
    looks(pace, 5)
    pace.heard(1, {"beats": 1}, time.monotonic())
    looks(pace, 1)
    assert pace.silence == 0, "another process goes on"
    place.rest()
    assert looks(pace, 10) == 0


def test_time_in_which_a_process_did_not_run_is_no_silence():
    place = Place()
    pace = Pace(place, compiles=False)
    place.at(step=0)
    looks(pace, 1)
    assert looks(pace, 2, every=3600) <= 4 * TICK


def test_the_first_step_of_a_network_that_is_compiled_may_take_its_time():
    place = Place()
    pace = Pace(place, compiles=True)
    place.at()
    place.at(step=4)
    assert looks(pace, 10) == 0
    place.at(step=5)
    looks(pace, 1)
    assert looks(pace, 10) > 3


HELD = """
import ctypes, sys
from training.vigil.stacks import prepare
print(prepare(), flush=True)
def hold():
    while True:
        ctypes.PyDLL(None).sleep(60)
hold()
"""


@linux
def test_the_stacks_of_a_process_that_is_stopped_or_holds_the_lock_are_written(tmp_path):
    from training.vigil.stacks import end_one_that_does_not_answer

    for rank in (0, 1):
        process = subprocess.Popen([sys.executable, "-c", HELD], stdout=subprocess.PIPE, text=True)
        file = int(process.stdout.readline())
        time.sleep(0.2)
        if rank:
            process.send_signal(signal.SIGSTOP)
            while not is_stopped(process.pid):
                time.sleep(0.01)
        end_one_that_does_not_answer(tmp_path, introduce(rank, stacks=file)._replace(pid=process.pid))
        assert process.wait(timeout=10) == -signal.SIGKILL
        process.stdout.close()
        assert "in hold" in (tmp_path / "stacks" / f"rank-{rank}.txt").read_text()


def test_a_failure_says_where_and_names_the_first_samples(tmp_path):
    failure = Failure("CRASH", 3, "node7", "it broke", "mend it", 12, tuple("abcdef"))
    assert failure.where() == "process 3 on node7, step 12, samples a, b, c, d and 2 more"
    assert failure.line() == 'FATAL code=CRASH rank=3 host=node7 step=12 hint="mend it"'
    assert failure.write(tmp_path, first=True)
    assert not failure.write(tmp_path, first=True), "another one was first"
    told = json.loads((tmp_path / "failure.json").read_text())
    assert (told["samples"], told["samples_under_way"]) == (list("abcd"), 6)
