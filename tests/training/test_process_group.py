"""Whole runs of processes that were started one by one: who can reach them, and links that are cut."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.hosts import hosts, missing
from tests.marked_processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parent.parent.parent
RUN = ROOT / "training" / "run.py"
STEPS = 30
SLACK = 5  # seconds from the last words to the end, on a machine that is busy with other tests

# Python runs sitecustomize.py in every process: steps take their time, so that there is some to disturb them.
SLOW = """
import sys, threading, time

def slow_down():
    while not hasattr(sys.modules.get("training.loop"), "train"):
        time.sleep(0.01)
    gradients = sys.modules["training.gradients"]
    plain = gradients.sums_of
    def sums_of(job, *rest, **keywords):
        time.sleep(0.1)
        return plain(job, *rest, **keywords)
    gradients.sums_of = sums_of

if "training/run.py" in " ".join(sys.orig_argv):
    threading.Thread(target=slow_down, daemon=True).start()
"""


class Job:
    """The processes of one job, each started as a person or a script would."""

    def __init__(self, folder, digits):
        self.folder, self._digits, self.processes = folder, digits, []
        (folder / "python").mkdir()
        (folder / "python" / "sitecustomize.py").write_text(SLOW)

    def start(self, rank, world, address, port, *, local, locals_, under=(), at="all", **options):
        folder = self.folder / at
        folder.mkdir(exist_ok=True)
        known = {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
        env = {
            **known,
            "HOME": str(self.folder),
            "PYTHONPATH": str(self.folder / "python"),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(locals_),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "LOCKSTEP_WAIT": "60",
        }
        flags = ["--run-dir", "run", "--data.root", self._digits, "--data.workers", 1, "--log.every-steps", 1]
        flags += ["--model.name", "test_resnet", "--train.max-steps", STEPS, "--debug.batch-digest", "keys"]
        command = [*(under(folder) if under else ()), sys.executable, RUN, *flags]
        with (folder / f"{rank}.txt").open("w") as said:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                **options,
            )
        self.processes.append(process)

    def said(self, rank, at="all"):
        return (self.folder / at / f"{rank}.txt").read_text()

    def steps(self, at="all"):
        """What metrics.jsonl says of each step of training, without what depends on the clock."""
        path = self.folder / at / "run" / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        kept = ("step", "loss", "batch_digest")
        return [{name: one[name] for name in kept} for one in records if one["kind"] == "train"]

    def reaches(self, step, at="all"):
        def look():
            assert all(process.poll() is None for process in self.processes), self.said(0, at)
            return len(self.steps(at)) >= step

        assert wait_until(look), self.said(0, at)

    def codes(self, within):
        end = time.monotonic() + within
        return [process.wait(timeout=max(0.1, end - time.monotonic())) for process in self.processes]

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def job(tmp_path, digits):
    started = []

    def make(name):
        (tmp_path / name).mkdir()
        started.append(Job(tmp_path / name, digits))
        return started[-1]

    yield make
    for one in started:
        one.end()


def pester(port, stop):
    """Strangers who find the port: garbage, a flood, and one that says nothing."""
    silent = []
    while not stop.is_set():
        try:
            silent.append(socket.create_connection(("127.0.0.1", port), timeout=1))
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b'{"token": "\\ud800", "nonce": "\\ud800"}\n' + os.urandom(1 << 17))
        except OSError:
            pass
        stop.wait(0.5)
    for one in silent:
        one.close()


def listening(process):
    """Addresses and ports at which a process takes connections, and those that it sends datagrams from."""
    found = psutil.Process(process.pid).net_connections("inet")
    return {tuple(one.laddr) for one in found if one.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)}


def test_processes_of_one_machine_are_out_of_reach_for_others_and_strangers_on_it_change_nothing(job):
    """Also the name of its own that a machine has leads nowhere else."""
    one, stop = job("one"), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pesterers = [threading.Thread(target=pester, args=(port, stop))]
    pesterers[0].start()
    try:
        for rank in range(3):
            one.start(rank, 3, socket.gethostname(), port, local=rank, locals_=3)
        one.reaches(2)
        open_to = set.union(*map(listening, one.processes))
        # The store and the vigil of process zero, and gloo's of each.
        assert len(open_to) >= 5
        assert {address for address, _ in open_to} == {"127.0.0.1"}
        pesterers += [threading.Thread(target=pester, args=(port, stop)) for _, port in open_to]
        for pesterer in pesterers[1:]:
            pesterer.start()
        assert one.codes(within=120) == [0, 0, 0], one.said(0)
    finally:
        stop.set()
        for pesterer in pesterers:
            pesterer.join()
    assert len(one.steps()) == STEPS


def no_way_back(zero, other):
    """The other host's packets go nowhere, those to it arrive."""
    subprocess.run([*other.under("/"), "ip", "route", "add", "blackhole", zero.address], check=True)


@pytest.mark.skipif(bool(missing()), reason=missing() or "there can be hosts")
def test_a_link_that_is_down_for_a_moment_changes_nothing_and_for_good_ends_both_sides(job):
    """The machines' own names lead them to loopback addresses, as Debian has it."""
    apart = job("apart")
    with hosts("h1", "h2", own="127.0.1.1") as (zero, other):
        apart.start(0, 3, "h1", 29500, local=0, locals_=1, under=zero.under, at="h1")
        for local in (0, 1):
            apart.start(1 + local, 3, "h1", 29500, local=local, locals_=2, under=other.under, at="h2")
        apart.reaches(3, at="h1")
        other.cut()
        time.sleep(3)
        other.heal()
        apart.reaches(12, at="h1")
        other.cut()
        began = time.time()
        assert apart.codes(within=15 + SLACK) == [69, 69, 69]
    assert (apart.folder / "h1" / "run" / "failure.json").stat().st_mtime - began < 15
    gone = "processes 1 and 2 on h2 have not been heard of for 10 seconds: their host or the network is gone"
    assert f"error: {gone}\nFATAL code=RENDEZVOUS rank=1 host=h2 step=" in apart.said(0, "h1")
    told = json.loads((apart.folder / "h1" / "run" / "failure.json").read_text())
    assert (told["code"], told["rank"], told["host"], told["what"]) == (
        "RENDEZVOUS",
        1,
        "h2",
        f"error: {gone}",
    )
    gone = "process 0 on h1 has not been heard of for 10 seconds: its host or the network is gone"
    for rank in (1, 2):
        assert f"error: {gone}\nFATAL code=RENDEZVOUS rank=0 host=h1 step=" in apart.said(rank, "h2")

    together = job("together")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for rank in range(3):
        together.start(rank, 3, "localhost", port, local=rank, locals_=3)
    together.reaches(12)
    assert together.steps()[:12] == apart.steps("h1")[:12]
    for process in together.processes:
        process.send_signal(signal.SIGKILL)


@pytest.mark.skipif(bool(missing()), reason=missing() or "there can be hosts")
def test_a_link_that_works_in_one_direction_only_ends_both_sides(job):
    apart = job("apart")
    with hosts("h1", "h2") as (zero, other):
        apart.start(0, 2, "h1", 29500, local=0, locals_=1, under=zero.under, at="h1")
        apart.start(1, 2, "h1", 29500, local=0, locals_=1, under=other.under, at="h2")
        apart.reaches(3, at="h1")
        no_way_back(zero, other)
        assert apart.codes(within=15 + SLACK) == [69, 69]
    assert "process 1 on h2 has not been heard of for 10 seconds" in apart.said(0, "h1")
    assert "process 0 on h1 has not been heard of for 10 seconds" in apart.said(1, "h2")
