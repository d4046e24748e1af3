"""Launchers of several machines, here two on one: they meet, contradict one another, lose one another."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.marked_processes import DEADLINE, living, wait_until
from tests.real_jobs import (
    BIN,
    EXACT,
    READY,
    STEPS,
    begin,
    check_same,
    clear_away,
    failure,
    last_step,
    ranks,
    records,
)

ENV = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def command(node, port, *options):
    where = ["--nodes", "2", "--node-rank", node, "--address", "127.0.0.1", "--port", port]
    return [str(BIN / "lockstep"), "launch", "--cpu", *map(str, where), *map(str, options), "--", "train"]


def refused_together(first, second, folder):
    """(exit code, lines on stderr) of each of two launchers, which must end before any process begins."""
    both = [
        subprocess.Popen(one, cwd=folder, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for one in (first, second)
    ]
    ends = []
    for one in both:
        _, said = one.communicate(timeout=60)
        ends.append((one.returncode, said.splitlines()))
    return ends


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ((0, "--cpu", "--seed", "1"), (1, "--cpu", "--seed", "2"), "it was told -- train --seed 2"),
        ((0, "--nodes", "3"), (1, "--cpu"), "node 1 on .* was started for 2 nodes .*, node 0 .* for 3"),
    ],
)
def test_machines_that_were_not_started_alike_are_told_so(first, second, said, port, tmp_path):
    commands = []
    for node, *rest in (first, second):
        plain = command(node, port)
        at = plain.index("--cpu")
        options = [word for word in rest[:2] if rest[0] == "--nodes"]
        words = rest[1:] if rest[0] == "--cpu" else []
        commands.append([*plain[:at], "--cpu", *plain[at + 1 : -2], *options, "--", "train", *words])
    for code, lines in refused_together(*commands, tmp_path):
        assert code == 2, lines
        assert re.search(said, lines[0]), lines
        assert lines[1].startswith("FATAL code=USAGE "), lines


def test_two_machines_with_one_number_are_told_so(port, tmp_path):
    others = [command(1, port, "--nodes", "3") for _ in range(2)]
    host = subprocess.Popen(
        command(0, port, "--nodes", "3"), cwd=tmp_path, env=ENV, stderr=subprocess.PIPE, text=True
    )
    for code, lines in [
        *refused_together(*others, tmp_path),
        (host.wait(60), host.stderr.read().splitlines()),
    ]:
        assert code == 2, lines
        assert "two nodes have --node-rank 1: pid " in lines[0], lines
    host.stderr.close()


def test_two_first_machines_are_told_so(port, tmp_path):
    with subprocess.Popen(
        command(0, port, "--wait", 20), cwd=tmp_path, env=ENV, stderr=subprocess.PIPE, text=True
    ) as first:
        assert wait_until(lambda: listens(port), within=20)
        second = subprocess.run(
            command(0, port), cwd=tmp_path, env=ENV, capture_output=True, text=True, check=False, timeout=60
        )
        assert second.returncode == 2, second.stderr
        assert "two nodes have --node-rank 0" in second.stderr
        assert first.wait(60) == 2
        assert "two nodes have --node-rank 0" in first.stderr.read()


@pytest.mark.parametrize(
    ("node", "options", "said"),
    [
        (0, [], "error: 1 of 2 nodes came within 1 seconds: missing --node-rank 1"),
        (1, [], "cannot reach node 0 at 127.0.0.1:.*: Connection refused"),
        (1, ["--address", "no-such-host.invalid"], "--address no-such-host.invalid: no such host"),
        (0, ["--address", "192.0.2.7"], "--address 192.0.2.7 .* is no address of .*, which is to be node 0"),
    ],
)
def test_who_is_missing_or_cannot_be_reached_is_named(node, options, said, port, tmp_path):
    plain = command(node, port, "--wait", "1", *options)
    done = subprocess.run(
        plain, cwd=tmp_path, env=ENV, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 69, done.stderr
    what, fatal = done.stderr.splitlines()
    assert re.search(said, what)
    assert fatal.startswith(f"FATAL code=RENDEZVOUS rank={node} ")


def test_a_port_that_somebody_else_has_is_named_with_its_owner(port, tmp_path):
    with socket.create_server(("127.0.0.1", port)):
        done = subprocess.run(
            command(0, port), cwd=tmp_path, env=ENV, capture_output=True, text=True, check=False, timeout=60
        )
    assert done.returncode == 69
    assert f"port {port} of 127.0.0.1 is taken by pid {os.getpid()}" in done.stderr


def test_a_stop_while_the_machines_meet_ends_it_at_once(port, tmp_path):
    with subprocess.Popen(
        command(0, port, "--wait", 60), cwd=tmp_path, env=ENV, stderr=subprocess.PIPE, text=True
    ) as host:
        assert wait_until(lambda: listens(port), within=20)
        host.send_signal(signal.SIGTERM)
        assert host.wait(5) == 75
        assert "before training began" in host.stderr.read()


def listens(port):
    """Whether somebody does, without coming in."""
    lines = Path("/proc/net/tcp").read_text().splitlines()
    return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines[1:])


# Whole runs.


def both(folder, port, digits, *options, pace):
    """A job's two launchers."""
    return [
        begin(command(node, port, *options), folder, digits=digits, pace=pace, name=f"node{node}", more=EXACT)
        for node in range(2)
    ]


def train(*jobs):
    def looks():
        return last_step(jobs[0].run_dir) >= READY or [job for job in jobs if job.process.poll() is not None]

    assert wait_until(looks) is True, text(jobs)


def end(*jobs):
    codes = [job.process.wait(timeout=DEADLINE) for job in jobs]
    assert wait_until(lambda: not any(living(job.mark) for job in jobs) or None, within=5), text(jobs)
    return codes


def text(jobs):
    return "\n".join(f"--- {job.name}\n{job.text()}" for job in jobs)


@pytest.mark.slow
def test_a_run_that_loses_a_machine_goes_on_without_it_to_the_same_bits(alone, digits, port, tmp_path):
    options = ["--max-restarts", 1, "--min-nodes", 1, "--wait", 4]
    first, second = both(tmp_path, port, digits, *options, pace=0.05)
    try:
        train(first, second)
        clear_away(second)  # launcher and process at once, as a machine does
        assert end(first) == [0], first.text()
        assert re.search("start 2 of 2: node 1 on .* is gone.* going on from step", first.text()), (
            first.text()
        )
        assert [one["processes"] for one in records(first.run_dir, "start")] == [2, 1]
        check_same(first.run_dir, alone)
    finally:
        clear_away(first)
        clear_away(second)


@pytest.mark.slow
def test_a_launcher_that_was_killed_may_be_typed_again_and_all_go_on(alone, digits, port, tmp_path):
    options = ["--max-restarts", 2, "--wait", 60]
    jobs = both(tmp_path, port, digits, *options, pace=0.05)
    try:
        train(*jobs)
        jobs[1].process.kill()
        again = command(1, port, *options)
        jobs.append(begin(again, tmp_path, digits=digits, name="again", more=EXACT))
        assert end(*jobs) == [0, -signal.SIGKILL, 0], text(jobs)
        assert "start 2 of 3: node 1 on " in jobs[0].text()
        check_same(jobs[0].run_dir, alone)
    finally:
        for job in jobs:
            clear_away(job)


@pytest.mark.slow
def test_a_kill_or_a_stop_on_one_machine_is_that_of_both(digits, port, tmp_path):
    """Two jobs side by side: of one the second machine's process is killed, the other hears USR1."""
    crashed = both(tmp_path / "crashed", port, digits, pace=0.1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        other = free.getsockname()[1]
    stopped = both(tmp_path / "stopped", other, digits, pace=0.1)
    try:
        train(*crashed)
        train(*stopped)
        os.kill(ranks(crashed[1])[1], signal.SIGKILL)
        stopped[1].process.send_signal(signal.SIGUSR1)
        assert end(*crashed) == [70, 70], text(crashed)
        assert failure(crashed[0].run_dir)["rank"] == 1
        assert all("process 1 was killed by signal 9" in job.text() for job in crashed[1:]), text(crashed)
        assert end(*stopped) == [75, 75], text(stopped)
        assert failure(stopped[0].run_dir)["code"] == "STOPPED"
        assert last_step(stopped[0].run_dir) < STEPS
    finally:
        for job in (*crashed, *stopped):
            clear_away(job)
