"""Processes that meet before torch is loaded: who is missing, alike, misled or late, and what is said."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch.rendezvous import meet
from launch.topology import step_port
from training.config import UserError
from training.vigil.ending import Ended

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import os
from launch import rendezvous
from training import process

with process.last_words() as place:
    place.listener = rendezvous.meet(os.environ)
    print("met", os.environ["MASTER_ADDR"])
"""


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(autouse=True)
def _short_good_bye(monkeypatch):
    monkeypatch.setattr("launch.meeting.LINGER", 0.3)


def variables(rank, world, port, *, wait=20, **others):
    """What a launcher gives one of so many processes of this machine."""
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCKSTEP_WAIT": wait, **others}
    return {name: str(value) for name, value in given.items()}


def outcome(env, *, after=0.0):
    """The variables after a meeting, or what it ended with."""
    time.sleep(after)
    try:
        listener = meet(env)
    except (Ended, UserError, SystemExit) as error:
        return error
    if listener is not None:
        listener.close()
    return env


def outcomes(envs, **later):
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(lambda env: outcome(env, after=later.get(env["RANK"], 0)), envs))


def test_all_processes_of_one_machine_meet_on_its_loopback_address(free_port):
    name = socket.gethostname()
    envs = outcomes([variables(rank, 3, free_port, MASTER_ADDR=name) for rank in range(3)])
    for env in envs:
        assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("127.0.0.1", str(free_port))
        assert env["GLOO_SOCKET_IFNAME"] == "lo"


def test_an_interface_that_somebody_has_chosen_stays(free_port):
    envs = outcomes([variables(rank, 2, free_port, GLOO_SOCKET_IFNAME="ib0") for rank in range(2)])
    assert [env["GLOO_SOCKET_IFNAME"] for env in envs] == ["ib0", "ib0"]


def test_a_process_alone_meets_nobody():
    env = {"WORLD_SIZE": "1", "LOCKSTEP_WAIT": "never"}
    assert meet(env) is None
    assert env == {"WORLD_SIZE": "1", "LOCKSTEP_WAIT": "never"}


def test_the_socket_that_the_launcher_made_is_where_they_meet():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, file = listener.getsockname()[1], listener.detach()
    envs = [variables(0, 2, 1, LOCKSTEP_LISTENER=file), variables(1, 2, port)]
    zero, one = outcomes(envs)
    assert zero["MASTER_PORT"] == one["MASTER_PORT"] == str(port)
    assert "LOCKSTEP_LISTENER" not in zero


@pytest.mark.parametrize("text", ["x", "-3", "987654"])
def test_what_is_no_such_socket_is_refused(text, free_port):
    error = outcome(variables(0, 2, free_port, LOCKSTEP_LISTENER=text))
    assert isinstance(error, UserError)
    assert f"LOCKSTEP_LISTENER='{text}' is no socket" in error.what


def test_eight_starts_at_once_that_chose_no_port_never_meet_one_another():
    """Of several clusters, or of one whose job numbers began anew, on the same machine."""
    job, step = 4_000_000 + os.getpid(), 0
    slurm = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}
    envs = [
        variables(rank, 3, step_port(job, step), LOCKSTEP_TOKEN=f"start {start}", **slurm)
        for rank in (1, 0, 2)
        for start in range(8)
    ]
    met = outcomes(envs)
    ports = {env["LOCKSTEP_TOKEN"]: set() for env in envs}
    for env in met:
        assert isinstance(env, dict), env
        ports[env["LOCKSTEP_TOKEN"]].add(env["MASTER_PORT"])
    assert [len(each) for each in ports.values()] == [1] * 8
    assert len(set.union(*ports.values())) == 8


def test_a_process_that_is_late_is_waited_for_and_one_that_never_comes_is_named(free_port):
    began = time.monotonic()
    met = outcomes([variables(rank, 3, free_port) for rank in range(3)], **{"1": 3})
    assert all(isinstance(env, dict) for env in met)
    assert 3 <= time.monotonic() - began < 10
    began = time.monotonic()
    zero, two = outcomes([variables(rank, 3, free_port, wait=1) for rank in (0, 2)])
    assert zero.what == "error: 2 of 3 processes came within 1 seconds: missing RANK 1"
    # Process zero has said it.
    assert isinstance(two, SystemExit)
    assert two.code == 69
    assert time.monotonic() - began < 5


def test_where_process_zero_never_comes_the_others_say_where_they_looked(free_port):
    error = outcome(variables(1, 2, free_port, wait=1))
    assert isinstance(error, Ended)
    assert error.code == "RENDEZVOUS"
    assert f"cannot reach process 0 at 127.0.0.1:{free_port}: Connection refused (1 s)" in error.what


@pytest.mark.parametrize(
    ("twice", "words"), [(1, "two processes have RANK 1: pid"), (0, "two processes have RANK 0: pid")]
)
def test_two_of_the_same_rank_are_named_at_once(free_port, twice, words):
    began = time.monotonic()
    errors = outcomes([variables(rank, 3, free_port) for rank in (0, 1, twice)])
    assert all(isinstance(error, UserError) and words in error.what for error in errors), errors
    assert time.monotonic() - began < 10


def test_processes_that_were_told_of_different_numbers_are_named_at_once(free_port):
    began = time.monotonic()
    envs = [variables(0, 3, free_port), variables(1, 4, free_port, LOCAL_WORLD_SIZE=3)]
    # The second is told of another machine.
    envs[1]["MASTER_ADDR"] = "localhost"
    for error in outcomes(envs):
        assert isinstance(error, UserError)
        assert "process 1 on " in error.what
        assert "was started for 4 processes (WORLD_SIZE), process 0 on" in error.what
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("rank", [0, 1])
def test_a_master_that_nobody_knows_is_named(rank, free_port):
    env = variables(rank, 2, free_port, wait=1, LOCAL_WORLD_SIZE=1, MASTER_ADDR="$(touch x).invalid")
    error = outcome(env)
    assert error.what == "error: MASTER_ADDR=$(touch x).invalid: no such host"
    assert not Path("x").exists()


def test_a_master_that_is_another_machine_is_named(free_port):
    """An address that is never anybody's: process zero cannot have it, the others cannot reach it."""
    envs = [
        variables(rank, 2, free_port, wait=1, LOCAL_WORLD_SIZE=1, MASTER_ADDR="192.0.2.1") for rank in (0, 1)
    ]
    zero, one = outcomes(envs)
    assert f"MASTER_ADDR=192.0.2.1 (192.0.2.1) is no address of {socket.gethostname()}" in zero.what
    assert f"cannot reach process 0 at 192.0.2.1:{free_port}: " in one.what


def test_a_port_that_is_taken_is_named_with_who_has_it():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = outcome(variables(0, 2, port, wait=1))
    assert isinstance(error, Ended)
    assert f"process 0 cannot listen at 127.0.0.1:{port}: it is taken by pid {os.getpid()}: " in error.what


def test_a_port_that_the_last_start_is_about_to_free_is_waited_for():
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    threading.Timer(2, taken.close).start()
    met = outcomes([variables(rank, 2, port) for rank in range(2)])
    assert all(isinstance(env, dict) for env in met)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_how_long_to_wait_is_a_number_of_seconds(text, free_port):
    error = outcome(variables(0, 2, free_port, wait=text))
    assert isinstance(error, UserError)
    assert f"LOCKSTEP_WAIT='{text}'" in error.what


def test_under_an_agent_its_store_is_looked_for_and_left_alone(free_port):
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    error = outcome(variables(0, 2, free_port, wait=1, **agent))
    assert f"cannot reach its launcher's store at 127.0.0.1:{free_port}: Connection refused" in error.what
    name = variables(1, 2, free_port, wait=1, MASTER_ADDR="no.invalid", LOCAL_WORLD_SIZE=1, **agent)
    assert outcome(name).what == "error: MASTER_ADDR=no.invalid: no such host"
    with socket.create_server(("127.0.0.1", free_port)) as store:
        env = outcome(variables(0, 2, free_port, **agent))
        assert env["GLOO_SOCKET_IFNAME"] == "lo"
        connection, _ = store.accept()
        assert connection.recv(1) == b""
        connection.close()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "code", "name"), [((0, 1), 69, "RENDEZVOUS"), ((0, 1, 1), 2, "USAGE")])
def test_all_end_alike_and_one_of_a_machine_speaks(tmp_path, free_port, ranks, code, name):
    processes = []
    for rank in ranks:
        env = {**os.environ, **variables(rank, 3, free_port, wait=3), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", PROGRAM]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=env, **pipes))
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(ranks)
    assert [out for out, _ in said] == [""] * len(ranks)
    assert [err for _, err in said[1:]] == [""] * (len(ranks) - 1)
    assert f"FATAL code={name} rank=0 hint=" in said[0][1]
    assert "Traceback" not in said[0][1]
