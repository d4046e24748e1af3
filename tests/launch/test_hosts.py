"""Jobs of two machines, started by hand on each: what cut links, dead hosts and mistakes come to."""

from __future__ import annotations

import time
import uuid
from signal import SIGKILL

import pytest

from tests.hosts import hosts, missing
from tests.marked_processes import DEADLINE, living, wait_until
from tests.real_jobs import (
    BIN,
    EXACT,
    READY,
    RUN,
    begin,
    check_same,
    clear_away,
    failure,
    last_step,
    launcher_in,
    records,
)
from training.checkpoints.protocol import newest_verified, step_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(why := missing()), reason=f"no hosts of our own: {why}"),
]

LOST_WITHIN = 15.0  # seconds in which a host that is gone is found out
SLACK = 8.0  # seconds that a busy machine may take longer


@pytest.fixture
def pair():
    with hosts("h1", "h2") as both:
        yield both


class Parts(list):
    """What runs on each host of a job."""

    def texts(self):
        return "\n".join(f"--- {part.name}\n{part.text()}" for part in self)

    def train(self):
        """Wait until it does."""
        ready = wait_until(
            lambda: last_step(self[0].run_dir) >= READY or [p for p in self if p.process.poll() is not None]
        )
        assert ready is True, self.texts()

    def end(self, *, within=DEADLINE):
        """The exit codes; nothing of it lives on for 5 seconds."""
        end = time.monotonic() + within
        for part in self:
            assert wait_until(
                lambda part=part: part.process.poll() is not None, within=end - time.monotonic()
            ), self.texts()
        assert wait_until(lambda: not living(self[0].mark), within=5), f"left over: {living(self[0].mark)}"
        return [part.process.returncode for part in self]


def by_hand(rank, *options, nodes=2, address="h1"):
    where = ["--nodes", nodes, "--node-rank", rank, "--address", address, "--processes-per-node", 1, "--cpu"]
    return [BIN / "lockstep", "launch", *where, *options, "--", "train"]


@pytest.fixture
def start(digits, tmp_path):
    """`start({host: command})`: a job of which each host runs a part, on their common disk."""
    started = []

    def call(commands, *more, pace=0.2, name="", folder=tmp_path):
        mark = uuid.uuid4().hex
        parts = Parts(
            begin(
                command,
                folder,
                digits=digits,
                pace=pace,
                more=more,
                under=host.under(folder),
                name=f"{host.name}{name}",
                mark=mark,
            )
            for host, command in commands.items()
        )
        started.extend(parts)
        return parts

    yield call
    for part in started:
        clear_away(part)


def test_two_hosts_learn_what_one_process_does_though_their_link_breaks_for_three_seconds(
    start, alone, tmp_path
):
    # As Debian has it: a host's own name leads to an address where nobody else can reach it.
    with hosts("h1", "h2", own="127.0.1.1") as (h1, h2):
        parts = start({h1: by_hand(0), h2: by_hand(1)}, *EXACT, pace=0.04)
        parts.train()
        h2.cut()
        time.sleep(3)
        h2.heal()
        assert parts.end() == [0, 0], parts.texts()
    check_same(tmp_path / "run", alone)
    assert records(tmp_path / "run", "start")[0]["processes"] == 2


def test_a_cut_link_ends_both_sides_which_name_the_lost_and_go_on_when_started_again(
    pair, start, alone, tmp_path
):
    h1, h2 = pair
    commands = {h1: by_hand(0), h2: by_hand(1)}
    parts = start(commands, *EXACT, pace=0.04)
    parts.train()
    h2.cut()
    assert parts.end(within=LOST_WITHIN + SLACK) == [69, 69], parts.texts()
    assert "node 1 on h2" in parts[0].text() or "process 1 on h2" in parts[0].text(), parts.texts()
    assert "node 0 at h1" in parts[1].text() or "process 0 on h1" in parts[1].text(), parts.texts()
    told = failure(tmp_path / "run")
    assert told["code"] == "RENDEZVOUS"
    assert f"process {told['rank']} on {told['host']} has not been heard of" in told["what"]
    h2.heal()
    again = start(commands, *EXACT, pace=None, name="-again")
    assert again.end() == [0, 0], again.texts()
    check_same(tmp_path / "run", alone)


def test_with_restarts_left_both_meet_again_when_the_link_is_whole(pair, start, alone, tmp_path):
    h1, h2 = pair
    wait = ("--max-restarts", 1, "--wait", 60)
    parts = start({h1: by_hand(0, *wait), h2: by_hand(1, *wait)}, *EXACT, pace=0.04)
    parts.train()
    h2.cut()
    time.sleep(20)
    h2.heal()
    assert parts.end() == [0, 0], parts.texts()
    check_same(tmp_path / "run", alone)
    assert len(records(tmp_path / "run", "start")) == 2


def test_where_one_host_is_enough_it_goes_on_without_the_dead_one(pair, start, alone, tmp_path):
    h1, h2 = pair
    enough = ("--max-restarts", 1, "--min-nodes", 1, "--wait", 5)
    parts = start({h1: by_hand(0, *enough), h2: by_hand(1, *enough)}, *EXACT, pace=0.04)
    parts.train()
    h2.crash()
    assert parts.end()[0] == 0, parts.texts()
    check_same(tmp_path / "run", alone)
    assert [one["processes"] for one in records(tmp_path / "run", "start")] == [2, 1]


def test_a_launcher_that_is_killed_takes_its_processes_with_it_and_the_other_one_hears_of_it(
    pair, start, tmp_path
):
    h1, h2 = pair
    jobs = {}
    for victim in (0, 1):
        port = ("--port", 29420 + victim)
        commands = {h1: by_hand(0, *port), h2: by_hand(1, *port)}
        jobs[victim] = start(commands, pace=0.5, folder=tmp_path / str(victim))
    for victim, parts in jobs.items():
        parts.train()
        launcher_in(parts[victim]).kill()
        codes = parts.end(within=LOST_WITHIN + SLACK)
        assert (codes[victim], codes[1 - victim]) == (-SIGKILL, 69), parts.texts()
        assert f"node {victim} " in parts[1 - victim].text()
        # The processes that it took with it asked to stop: all have saved the step after which they did.
        newest = newest_verified(parts[0].run_dir / "checkpoints", say=print)
        assert step_of(newest) == last_step(parts[0].run_dir) >= READY


OTHERS = {
    "torchrun": lambda rank: [
        BIN / "torchrun",
        "--nnodes=2",
        f"--node_rank={rank}",
        "--nproc_per_node=1",
        "--master_addr=h1",
        "--master_port=29400",
        RUN,
    ],
    "accelerate": lambda rank: [
        *(BIN / "accelerate", "launch", "--multi_gpu", "--num_machines=2", "--num_processes=2"),
        *(f"--machine_rank={rank}", "--main_process_ip=h1", "--main_process_port=29401", "--same_network"),
        RUN,
    ],
}


def test_a_cut_link_ends_both_sides_under_the_launchers_of_others_too(pair, start, tmp_path):
    h1, h2 = pair
    jobs = {
        name: start({h1: command(0), h2: command(1)}, pace=0.5, folder=tmp_path / name)
        for name, command in OTHERS.items()
    }
    for parts in jobs.values():
        parts.train()
    h2.cut()
    end = time.monotonic() + LOST_WITHIN + SLACK
    for parts in jobs.values():
        # They have their own ways of ending, and 1 for whatever happened.
        assert parts.end(within=end - time.monotonic()) == [1, 1], parts.texts()
        assert failure(parts[0].run_dir)["code"] == "RENDEZVOUS"


def test_what_does_not_go_together_is_named_in_time(pair, start):
    """Before anything heavy is loaded: none of these gets as far as a run directory."""
    h1, h2 = pair

    def parts(name, *launchers, port, wait=10):
        options = ("--wait", wait, "--port", port)
        return [
            start({host: by_hand(rank, *options, **keywords)}, name=f"-{name}-{number}")[0]
            for number, (host, rank, keywords) in enumerate(launchers)
        ]

    three = {"nodes": 3}
    began = time.monotonic()
    cases = [
        (parts("nobody-comes", (h1, 0, {}), port=29401, wait=3), 69, "missing --node-rank 1"),
        (parts("nobody-there", (h2, 1, {}), port=29402, wait=3), 69, "h1:29402"),
        (parts("no-such-host", (h2, 1, {"address": "h9"}), port=29403, wait=3), 69, "h9"),
        (
            parts("alike", (h1, 0, three), (h2, 1, three), (h2, 1, three), port=29404),
            2,
            "two nodes have --node-rank 1",
        ),
        (
            parts("other-nodes", (h1, 0, {}), (h2, 1, three), port=29405),
            2,
            "was started for 3 nodes (--nodes)",
        ),
    ]
    for found, code, word in cases:
        together = Parts(found)
        left = began + LOST_WITHIN + SLACK - time.monotonic()
        assert set(together.end(within=left)) == {code}, together.texts()
        for part in together:
            assert word in part.text(), together.texts()
        assert "Traceback" not in together.texts()
        assert not part.run_dir.exists()
