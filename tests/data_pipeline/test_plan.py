import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.plan import Plan, evaluation_work, share, training_work


@st.composite
def plans(draw):
    shards = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    lanes = draw(st.sampled_from([1, 2, 4, 8]))
    global_batch = lanes * draw(st.integers(1, 8))
    while sum(shards) < global_batch:
        shards.append(global_batch)
    block, seed = draw(st.integers(1, 50)), draw(st.integers(0, 2**63 - 1))
    return Plan(np.array(shards), seed=seed, global_batch=global_batch, lanes=lanes, shuffle_block=block)


def epoch_batches(plan, epoch):
    first = epoch * plan.steps_per_epoch
    return [plan.batch(step) for step in range(first, first + plan.steps_per_epoch)]


def example(seed=0, samples=1003, global_batch=16):
    shards = np.full(samples // 59 + 1, 59)
    shards[-1] = samples % 59
    return Plan(shards, seed=seed, global_batch=global_batch, lanes=4, shuffle_block=32)


@given(plans(), st.integers(0, 3))
def test_an_epoch_reads_every_sample_once_apart_from_the_dropped_tail(plan, epoch):
    batches = epoch_batches(plan, epoch)
    read = np.concatenate(batches)
    assert all(len(batch) == plan.global_batch for batch in batches)
    assert len(set(read.tolist())) == len(read) == plan.samples - plan.samples % plan.global_batch
    assert read.min() >= 0
    assert read.max() < plan.samples


@given(plans(), st.integers(1, 12), st.integers(1, 9), st.integers(0, 40))
def test_the_processes_together_read_exactly_the_global_batch_in_its_order(
    plan, processes, micro_batch, step
):
    read = []
    for process in range(processes):
        pieces = list(
            training_work(
                plan,
                steps=range(step, step + 1),
                process=process,
                processes=processes,
                micro_batch=micro_batch,
            )
        )
        assert [work.piece for work in pieces] == list(range(pieces[0].pieces))
        assert all(len(work.numbers) <= micro_batch and work.step == step for work in pieces)
        assert all(work.epoch == step // plan.steps_per_epoch for work in pieces)
        read += [work.numbers for work in pieces if work.valid]
    assert np.concatenate(read).tolist() == plan.batch(step).tolist()


@given(plans(), st.integers(0, 40))
def test_a_batch_does_not_depend_on_what_was_asked_before(plan, step):
    expected = plan.batch(step)
    fresh = Plan(
        plan.shard_samples,
        seed=plan.seed,
        global_batch=plan.global_batch,
        lanes=plan.lanes,
        shuffle_block=plan.shuffle_block,
    )
    for other in (step + 7, step + 1, 0):
        fresh.batch(other)
    assert fresh.batch(step).tolist() == expected.tolist()


def test_a_process_without_a_share_gets_a_stand_in_that_does_not_count():
    plan = example(global_batch=4)
    for process in range(7):
        (work,) = training_work(plan, steps=range(3, 4), process=process, processes=7, micro_batch=8)
        assert len(work.numbers) == (1 if process < 4 else 2)  # a pair: BatchNorm cannot train on one sample
        assert work.valid == (process < 4)
        assert work.numbers[0] in plan.batch(3)


def test_micro_batches_of_one_sample_are_avoided():
    (plan, sizes) = (example(global_batch=20), [])
    for work in training_work(plan, steps=range(1), process=0, processes=1, micro_batch=19):
        sizes.append(len(work.numbers))
    assert sizes == [10, 10]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [np.concatenate(epoch_batches(example(seed), epoch)) for seed in (0, 1) for epoch in (0, 1, 2)]
    firsts = {tuple(order[:16].tolist()) for order in orders}
    assert len(firsts) == len(orders)
    # Not a rotation or a reversal of each other: hardly any sample keeps its place.
    assert all((orders[0] == other).mean() < 0.05 for other in orders[1:])


def test_the_dropped_tail_differs_from_epoch_to_epoch():
    plan = example()
    everything = set(range(plan.samples))
    tails = [everything - set(np.concatenate(epoch_batches(plan, epoch)).tolist()) for epoch in range(8)]
    assert all(len(tail) == 1003 % 16 for tail in tails)
    assert len({frozenset(tail) for tail in tails}) >= 7


def test_the_order_is_shuffled_within_shards_and_not_only_across_them():
    read = np.concatenate(epoch_batches(example(), 0))
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


def test_a_global_batch_that_the_lanes_do_not_divide_is_our_own_mistake():
    with pytest.raises(AssertionError):
        Plan(np.array([10]), seed=0, global_batch=6, lanes=4, shuffle_block=4)


HUGE = """
import resource
import numpy as np
from data_pipeline.plan import Plan
plan = Plan(np.full(10**6, 10**4), seed=0, global_batch=4096, lanes=8, shuffle_block=1 << 16)
last = plan.steps_per_epoch
for step in (0, 1, 2, last // 2, last - 1, last, last + 1):
    batch = plan.batch(step)
    assert len(set(batch.tolist())) == 4096 and batch.max() < 10**10
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_ten_billion_samples_in_a_million_shards_are_planned_in_memory_for_the_shards_alone():
    done = subprocess.run(
        [sys.executable, "-c", HUGE], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) < 1_000_000  # KiB
