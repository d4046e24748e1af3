"""Where the seconds of a training go: none is lost, none is counted twice, and records tell them."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.stopwatch import BESIDE, PARTS, Stopwatch, added

ROOT = Path(__file__).parent.parent.parent


class Ticks:
    """A clock that a test turns on."""

    def __init__(self):
        self.now = 0

    def mark(self):
        return self.now

    def between(self, first, second):
        return second - first

    def settle(self, last):
        assert last <= self.now

    def take_back(self, marks):
        pass


@given(
    st.lists(st.tuples(st.sampled_from((*PARTS, "evaluation", "lap")), st.integers(0, 9)), max_size=40),
)
def test_every_second_belongs_to_one_part_and_to_one_lap(happenings):
    clock = Ticks()
    watch = Stopwatch(clock)
    expected, laps, part = dict.fromkeys((*PARTS, *BESIDE), 0), [], "other"
    for name, ticks in happenings:
        if name == "lap":
            laps.append(watch.lap())
        else:
            part = name
            watch.switch(part)
        clock.now += ticks
        expected[part] += ticks
    laps.append(watch.lap())
    found = [watch.read(lap) for lap in laps]
    assert sum(sum(lap.values()) for lap in found) == clock.now
    assert watch.totals == expected
    assert all(set(PARTS) <= lap.keys() for lap in found)


def test_the_seconds_of_a_lap_add_up_to_its_wall_clock():
    before = time.perf_counter()
    watch = Stopwatch()
    begun = time.perf_counter()
    watch.switch("data")
    time.sleep(0.02)
    watch.switch("compute")
    time.sleep(0.01)
    end = time.perf_counter()
    lap = watch.lap()
    after = time.perf_counter()
    seconds = lap.seconds()
    assert end - begun <= sum(seconds.values()) <= after - before
    assert seconds["data"] >= 0.02
    assert seconds["compute"] >= 0.01
    assert seconds["reduce"] == 0


def test_another_thread_may_switch_as_the_backward_pass_of_a_gpu_does():
    clock = Ticks()
    watch = Stopwatch(clock)
    watch.switch("compute")
    clock.now += 3
    thread = threading.Thread(target=watch.switch, args=("reduce",))
    thread.start()
    thread.join()
    clock.now += 4
    seconds = watch.lap().seconds()
    assert (seconds["compute"], seconds["reduce"]) == (3, 4)


def test_what_comes_before_the_first_step_is_no_part_of_it():
    clock = Ticks()
    watch = Stopwatch(clock)
    for part, ticks in (("evaluation", 5), ("other", 2), ("reduce", 3)):
        watch.switch(part)
        clock.now += ticks
    watch.started()
    clock.now += 4
    assert watch.lap().seconds() == {**dict.fromkeys(PARTS, 0), "other": 4}
    assert {part: watch.totals[part] for part in BESIDE} == {"start": 5, "evaluation": 5}


def test_seconds_are_added_part_by_part():
    assert added({"data": 1.0}, {"data": 2.0, "evaluation": 3.0}) == {"data": 3.0, "evaluation": 3.0}


@pytest.mark.slow
def test_records_hold_all_seconds_since_the_one_before_and_the_end_names_the_bottleneck(
    digits, execute, tmp_path
):
    """Read in the training thread and with next to nothing to compute, a run waits for its data."""
    command = [sys.executable, ROOT / "training" / "run.py", "--run-dir", "run", "--data.root", digits]
    command += ["--data.workers", "0", "--model.name", "mlp", "--train.epochs", "2", "--log.every-steps", "5"]
    command += ["--model.arguments", "{height: 32, width: 32, hidden: [8]}"]
    began = time.monotonic()
    done = execute(command)
    wall = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [one["seconds"] for one in records if one["kind"] == "train"]
    evaluations = [one["seconds"] for one in records if one["kind"] == "eval"]
    assert len(train) == 44 // 5 + 1
    assert all(tuple(one) == PARTS for one in train)
    assert all(one["evaluation"] > 0 for one in evaluations)
    assert sum(sum(one.values()) for one in train + evaluations) < wall
    # The checkpoint behind step 22 is in the record of the steps from 21 to 25.
    assert [one["checkpoint"] > 0 for one in train] == [number == 4 for number in range(len(train))]
    totals = {part: sum(one[part] for one in train) for part in PARTS}
    assert max(PARTS, key=lambda part: totals[part]) == "data"
    assert totals["reduce"] < 0.1 * sum(totals.values())
    (overview,) = [line for line in done.stdout.splitlines() if line.startswith("time ")]
    (bottleneck,) = [line for line in done.stdout.splitlines() if "bottleneck" in line]
    assert "% waiting for data" in overview
    assert "bottleneck: waiting for data; raise --data.workers (0 now" in bottleneck
