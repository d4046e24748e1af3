import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.balance import Balance, class_table, class_totals
from data_pipeline.plan import Plan, evaluation_work, share, training_work


@dataclass(frozen=True)
class Made:
    """What a plan was made of, so that it can be made again."""

    labels: list[list[int]]  # of each shard
    options: dict[str, int]
    strength: float | None

    def plan(self):
        columns = [np.array(one, np.int32) for one in self.labels]
        balance = None
        if self.strength is not None:
            balance = Balance(self.strength, class_table(columns, 4), columns.__getitem__)
        return Plan(np.array([len(one) for one in columns]), **self.options, balance=balance)


@st.composite
def made(draw, balanced=None):
    """Shards of any size, empty ones and single samples too, with labels of four unequal classes."""
    sizes = draw(st.lists(st.one_of(st.integers(0, 2), st.integers(0, 40)), min_size=1, max_size=12))
    lanes = draw(st.sampled_from([1, 2, 4, 8]))
    global_batch = lanes * draw(st.integers(1, 8))
    while sum(sizes) < global_batch:
        sizes.append(global_batch)
    label = st.sampled_from([0] * 12 + [1] * 3 + [2])
    labels = [draw(st.lists(label, min_size=size, max_size=size)) for size in sizes]
    options = {"seed": draw(st.integers(0, 2**63 - 1)), "shuffle_block": draw(st.integers(1, 50))}
    strengths = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
    if balanced is None:
        strengths = st.one_of(st.none(), strengths)
    return Made(labels, {**options, "lanes": lanes, "global_batch": global_batch}, draw(strengths))


def plans():
    return made().map(Made.plan)


def epoch_batches(plan, epoch):
    first = epoch * plan.steps_per_epoch
    return [plan.drawn(step) for step in range(first, first + plan.steps_per_epoch)]


def pairs(drawn):
    """Number and copy of each sample: what a balanced epoch has but once."""
    copies = np.zeros_like(drawn.numbers) if drawn.copies is None else drawn.copies
    return list(zip(drawn.numbers.tolist(), copies.tolist(), strict=True))


def read_in(plan, epoch):
    return np.concatenate([one.numbers for one in epoch_batches(plan, epoch)])


def example(seed=0, samples=1003, global_batch=16):
    shards = np.full(samples // 59 + 1, 59)
    shards[-1] = samples % 59
    return Plan(shards, seed=seed, global_batch=global_batch, lanes=4, shuffle_block=32)


@settings(deadline=None)
@given(plans(), st.integers(0, 3))
def test_an_epoch_reads_every_sample_once_apart_from_the_dropped_tail(plan, epoch):
    batches = epoch_batches(plan, epoch)
    assert all(len(batch.numbers) == len(plan.batch(0)) == plan.global_batch for batch in batches)
    read = Counter(pair for batch in batches for pair in pairs(batch))
    assert set(read.values()) == {1}
    assert len(read) == plan.samples - plan.samples % plan.global_batch
    assert all(0 <= number < plan.samples and copy >= 0 for number, copy in read)


@settings(deadline=None)
@given(made(balanced=True), st.integers(0, 3))
def test_a_balanced_epoch_has_all_occurrences_of_its_classes_apart_from_the_dropped_tail(origin, epoch):
    plan = origin.plan()
    labels = np.concatenate([np.array(one, int) for one in origin.labels])
    read = Counter(labels[read_in(plan, epoch)].tolist())
    totals = class_totals(np.bincount(labels, minlength=4), origin.strength)
    missing = totals - np.array([read[label] for label in range(4)])
    assert missing.min() >= 0
    assert missing.sum() == plan.samples % plan.global_batch


def test_a_strength_of_zero_reads_every_sample_once():
    labels = [np.arange(10) % 3, np.zeros(6, int)]
    balance = Balance(0.0, class_table(labels, 3), labels.__getitem__)
    plan = Plan(np.array([10, 6]), seed=0, global_batch=4, lanes=2, shuffle_block=4, balance=balance)
    assert sorted(read_in(plan, 1)) == list(range(16))


@settings(deadline=None)
@given(plans(), st.integers(1, 12), st.integers(1, 9), st.integers(0, 40), st.booleans())
def test_the_processes_together_read_exactly_the_global_batch_in_its_order(
    plan, processes, micro_batch, step, mixing
):
    read, largest = [], -(-plan.global_batch // processes)
    for process in range(processes):
        topology = {"process": process, "processes": processes, "micro_batch": micro_batch}
        pieces = list(training_work(plan, steps=range(step, step + 1), **topology, mixing=mixing))
        # As many for all: in a forward pass they may add up the statistics of BatchNorm.
        assert {work.pieces for work in pieces} == {len(pieces)} == {-(-largest // micro_batch)}
        assert [work.piece for work in pieces] == list(range(len(pieces)))
        assert all(0 < len(work.numbers) <= micro_batch and work.step == step for work in pieces)
        sizes = [len(work.numbers) if work.valid else 0 for work in pieces]
        assert max(sizes) - min(sizes) <= 1
        assert all(work.epoch == step // plan.steps_per_epoch for work in pieces)
        read += [work for work in pieces if work.valid]
    batch = pairs(plan.drawn(step))
    assert [pair for work in read for pair in pairs(work)] == batch
    assert all(work.first == sum(len(one.numbers) for one in read[:place]) for place, work in enumerate(read))
    if mixing:
        partners = [
            (number, 0 if work.partner_copies is None else int(work.partner_copies[row]))
            for work in read
            for row, number in enumerate(work.partners.tolist())
        ]
        assert partners == [
            batch[place ^ 1 if place ^ 1 < len(batch) else place] for place in range(len(batch))
        ]
    else:
        assert all(work.partners is None and work.partner_copies is None for work in read)


@settings(deadline=None)
@given(made(), st.integers(0, 40))
def test_a_batch_does_not_depend_on_what_was_asked_before(origin, step):
    expected = pairs(origin.plan().drawn(step))
    fresh = origin.plan()
    for other in (step + 7, step + 1, 0):
        fresh.batch(other)
    assert pairs(fresh.drawn(step)) == expected
    assert fresh.batch(step).tolist() == [number for number, _ in expected]


@st.composite
def legs(draw):
    """Stretches of a run, each a start of its own: steps, processes, micro-batch."""
    starts = st.tuples(st.integers(1, 30), st.integers(1, 5), st.integers(1, 16))
    return draw(st.lists(starts, min_size=1, max_size=4))


def check_legs(origin, run):
    read, step = [], 0
    for length, processes, micro_batch in run:
        steps = range(step, step + length)
        plan, per_step = origin.plan(), {one: [] for one in steps}
        for process in range(processes):
            topology = {"process": process, "processes": processes, "micro_batch": micro_batch}
            for work in training_work(plan, steps=steps, **topology):
                per_step[work.step] += pairs(work) if work.valid else []
        read += per_step.values()
        step = steps.stop
    whole = origin.plan()
    assert read == [pairs(whole.drawn(one)) for one in range(step)]


@settings(max_examples=150, deadline=None)
@given(made(), legs())
def test_a_run_that_stops_and_goes_on_elsewhere_reads_what_one_that_never_stops_reads(origin, run):
    check_legs(origin, run)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(made(), legs())
def test_thousands_of_runs_that_stop_and_go_on_elsewhere_read_what_those_that_never_stop_read(origin, run):
    check_legs(origin, run)


def test_a_process_with_fewer_samples_than_micro_batches_ends_on_stand_ins():
    plan = example(global_batch=12)
    for process, micro_batch, samples in ((0, 2, [2, 1]), (4, 2, [1, 1]), (4, 1, [1, 1]), (0, 1, [1, 1, 1])):
        works = list(
            training_work(plan, steps=range(1), process=process, processes=5, micro_batch=micro_batch)
        )
        counted = [len(work.numbers) for work in works if work.valid]
        assert counted == samples
        assert len(works) == (2 if micro_batch == 2 else 3)
        assert [work.valid for work in works] == [True] * len(counted) + [False] * (len(works) - len(counted))


def test_a_process_without_a_share_gets_a_stand_in_that_does_not_count():
    plan = example(global_batch=4)
    for process in range(7):
        (work,) = training_work(plan, steps=range(3, 4), process=process, processes=7, micro_batch=8)
        assert len(work.numbers) == (1 if process < 4 else 2)  # a pair: BatchNorm cannot train on one sample
        assert work.valid == (process < 4)
        assert work.numbers[0] in plan.batch(3)
        assert work.first == (process if process < 4 else 0)


def test_a_stand_in_is_whole_in_every_way_that_others_are():
    labels = [np.array([0, 0, 0, 0, 0, 1])]
    balance = Balance(1.0, class_table(labels, 2), labels.__getitem__)
    for batch in (1, 2, 3):
        plan = Plan(np.array([6]), seed=0, global_batch=batch, lanes=1, shuffle_block=4, balance=balance)
        (work,) = training_work(plan, steps=range(1, 2), process=4, processes=5, micro_batch=2, mixing=True)
        drawn = pairs(plan.drawn(1))
        own = [0, min(1, batch - 1)]
        assert (work.valid, work.first, pairs(work)) == (False, 0, [drawn[place] for place in own])
        partners = list(zip(work.partners.tolist(), work.partner_copies.tolist(), strict=True))
        assert partners == [drawn[place] for place in own[::-1]]


def test_micro_batches_of_one_sample_are_avoided():
    (plan, sizes) = (example(global_batch=20), [])
    for work in training_work(plan, steps=range(1), process=0, processes=1, micro_batch=19):
        sizes.append(len(work.numbers))
    assert sizes == [10, 10]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [read_in(example(seed), epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    firsts = {tuple(order[:16].tolist()) for order in orders}
    assert len(firsts) == len(orders)
    # Not a rotation or a reversal of each other: hardly any sample keeps its place.
    assert all((orders[0] == other).mean() < 0.05 for other in orders[1:])


def test_the_dropped_tail_differs_from_epoch_to_epoch():
    plan = example()
    everything = set(range(plan.samples))
    tails = [everything - set(read_in(plan, epoch).tolist()) for epoch in range(8)]
    assert all(len(tail) == 1003 % 16 for tail in tails)
    assert len({frozenset(tail) for tail in tails}) >= 7


def test_the_order_is_shuffled_within_shards_and_not_only_across_them():
    read = read_in(example(), 0)
    assert (np.diff(read) == 1).mean() < 0.1


def test_a_lane_reads_few_shards_at_a_time():
    plan = Plan(np.full(64, 100), seed=0, global_batch=16, lanes=4, shuffle_block=50)
    for step in range(plan.steps_per_epoch):
        assert len(set((plan.batch(step) // 100).tolist())) <= 4 * 2


@given(st.integers(0, 500), st.integers(1, 40))
def test_shares_are_consecutive_cover_everything_and_differ_by_at_most_one(count, parts):
    shares = [share(count, part, parts) for part in range(parts)]
    assert [number for one in shares for number in one] == list(range(count))
    sizes = [len(one) for one in shares]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 300), st.integers(1, 50), st.integers(1, 20))
def test_an_evaluation_reads_every_sample_once_in_the_same_batches_on_any_number_of_processes(
    samples, batch, processes
):
    alone = [tuple(work.numbers) for work in evaluation_work(samples, batch=batch, process=0, processes=1)]
    together = []
    for process in range(processes):
        works = list(evaluation_work(samples, batch=batch, process=process, processes=processes))
        assert all(work.valid and work.pieces == len(works) for work in works)
        together += [tuple(work.numbers) for work in works]
    assert together == alone
    assert Counter(number for numbers in together for number in numbers) == Counter(range(samples))


def test_fewer_samples_than_processes_are_still_evaluated_once_each():
    works = [list(evaluation_work(3, batch=1, process=process, processes=5)) for process in range(5)]
    assert [len(one) for one in works] == [1, 1, 1, 0, 0]


def test_the_order_is_the_one_that_recorded_runs_were_made_with():
    plan = Plan(np.array([5, 3, 7, 6]), seed=7, global_batch=4, lanes=2, shuffle_block=3)
    assert plan.steps_per_epoch == 5
    assert [plan.batch(step).tolist() for step in range(12)] == [
        [13, 14, 15, 16],
        [0, 2, 17, 18],
        [1, 3, 19, 20],
        [6, 5, 10, 8],
        [4, 7, 9, 11],
        [17, 15, 13, 12],
        [16, 19, 14, 1],
        [20, 18, 2, 0],
        [8, 10, 4, 3],
        [9, 11, 5, 6],
        [4, 3, 13, 15],
        [5, 7, 14, 17],
    ]


def test_the_balanced_order_is_the_one_that_recorded_runs_were_made_with():
    labels = [np.array([0, 0, 1]), np.array([0, 0, 0, 2]), np.array([0]), np.array([0, 0, 1, 0])]
    balance = Balance(0.5, class_table(labels, 3), labels.__getitem__)
    plan = Plan(np.array([3, 4, 1, 4]), seed=7, global_batch=4, lanes=2, shuffle_block=3, balance=balance)
    assert plan.steps_per_epoch == 3
    assert [pairs(plan.drawn(step)) for step in range(6)] == [
        [(8, 0), (11, 0), (2, 1), (6, 0)],
        [(10, 0), (2, 0), (5, 0), (3, 0)],
        [(9, 0), (0, 0), (6, 1), (4, 0)],
        [(3, 0), (6, 1), (9, 0), (10, 1)],
        [(4, 0), (11, 0), (7, 0), (2, 0)],
        [(8, 0), (10, 0), (6, 0), (1, 0)],
    ]


def test_a_global_batch_that_the_lanes_do_not_divide_is_our_own_mistake():
    with pytest.raises(AssertionError):
        Plan(np.array([10]), seed=0, global_batch=6, lanes=4, shuffle_block=4)


def calls_of(plan, step):
    """Calls of functions, Python's and C's, that the batch of a plan never asked before takes."""
    counted = Counter()

    def count(frame, event, argument):
        counted[event] += 1

    sys.setprofile(count)
    try:
        plan.drawn(step)
    finally:
        sys.setprofile(None)
    return counted["call"] + counted["c_call"]


@pytest.mark.parametrize("strength", [None, 0.5])
def test_a_step_that_is_a_million_epochs_away_costs_no_more_than_the_first(strength):
    labels = [[0] * 50 + [1] * (shard % 5) for shard in range(20)]
    origin = Made(labels, {"seed": 0, "global_batch": 32, "lanes": 4, "shuffle_block": 16}, strength)
    first = calls_of(origin.plan(), 0)
    for epoch in (1, 1000, 10**6):
        step = epoch * origin.plan().steps_per_epoch + 17
        assert calls_of(origin.plan(), step) < 2 * first


HUGE = """
import re
from pathlib import Path
import numpy as np
from data_pipeline.balance import Balance
from data_pipeline.plan import Plan
SETTING
last = plan.steps_per_epoch
for step in (0, 1, 2, last // 2, last - 1, last, last + 1):
    batch = plan.drawn(step)
    copies = batch.numbers * 0 if batch.copies is None else batch.copies
    assert len(set(zip(batch.numbers.tolist(), copies.tolist()))) == 4096 and batch.numbers.max() < 10**10
# Of this program alone: ru_maxrss begins with what the process had that started it.
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
MANY_SHARDS = """
plan = Plan(np.full(10**6, 10**4), seed=0, global_batch=4096, lanes=8, shuffle_block=1 << 16)
"""
BALANCED = """
counts = np.array([90_000, 5_000, 3_000, 1_000, 500, 300, 150, 40, 9, 1])
labels = np.repeat(np.arange(10, dtype=np.int32), counts)
balance = Balance(1.0, np.tile(counts, (10**5, 1)), lambda shard: labels)
plan = Plan(
    np.full(10**5, 10**5), seed=0, global_batch=4096, lanes=8, shuffle_block=1 << 14, balance=balance
)
"""


@pytest.mark.parametrize("setting", [MANY_SHARDS, BALANCED], ids=["many shards", "balanced"])
def test_ten_billion_samples_are_planned_in_memory_for_the_shards_alone(setting):
    code = HUGE.replace("SETTING", setting)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) < 1_000_000  # KiB
