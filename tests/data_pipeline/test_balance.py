from collections import Counter
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.balance import Balance, Occurrences, class_table, class_totals
from data_pipeline.draws import Purpose, bit_stream
from data_pipeline.fault import UserError
from data_pipeline.plan import Plan

STRENGTHS = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
CLASSES = 5


@st.composite
def labelled_shards(draw):
    """Shards of any size with labels of classes that are anything but equal; the last one is never there."""
    label = st.sampled_from([0] * 20 + [1] * 5 + [2, 3])
    shards = draw(st.lists(st.lists(label, max_size=30), min_size=1, max_size=8))
    if not any(shards):
        shards.append([0])
    return [np.array(shard, np.int32) for shard in shards]


def balance_of(shards, strength, classes=CLASSES):
    return Balance(strength, class_table(shards, classes), shards.__getitem__)


def times_of(shards, strength, *, epoch=0, seed=0):
    """How often each sample of the split occurs in the epoch; checks that its copies are 0, 1, 2 ..."""
    occurrences = Occurrences(balance_of(shards, strength), seed)
    times = []
    for shard, size in enumerate(occurrences.shard_sizes(epoch).tolist()):
        found = Counter()
        if size:
            rows = occurrences.rows(epoch, shard, np.arange(size))
            for row, copy in sorted(zip(rows.rows.tolist(), rows.copies.tolist(), strict=True)):
                assert copy == found[row]
                found[row] += 1
        assert set(found) <= set(range(len(shards[shard])))
        times += [found[row] for row in range(len(shards[shard]))]
    return np.array(times)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), STRENGTHS)
def test_an_epoch_keeps_its_length_and_every_class_its_share_of_it(counts, strength):
    counts = np.array(counts)
    totals = class_totals(counts, strength)
    assert totals.sum() == counts.sum()
    assert ((totals >= 1) == (counts >= 1)).all()
    if counts.any():
        shares = np.where(counts > 0, np.maximum(counts, 1.0) ** (1 - strength), 0)
        assert np.abs(totals - counts.sum() * shares / shares.sum()).max() < 1 + 1e-9 * counts.sum()


def test_the_ends_of_the_scale_are_the_classes_as_they_are_and_every_class_equally_often():
    counts = np.array([7, 0, 90, 2, 1])
    assert class_totals(counts, 0.0).tolist() == counts.tolist()
    assert class_totals(counts, 1.0).tolist() == [25, 0, 25, 25, 25]
    assert class_totals(np.array([100, 4]), 0.5).tolist() == [87, 17]  # as 10 to 2
    assert class_totals(np.zeros(3, np.int64), 0.5).tolist() == [0, 0, 0]


@given(labelled_shards(), STRENGTHS, st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_in_every_epoch_a_class_has_its_occurrences_spread_evenly_over_its_samples(
    shards, strength, seed, epoch
):
    labels, times = np.concatenate(shards), times_of(shards, strength, seed=seed, epoch=epoch)
    totals = class_totals(np.bincount(labels, minlength=CLASSES), strength)
    for one in np.unique(labels):
        own = times[labels == one]
        assert own.sum() == totals[one]
        assert own.max() - own.min() <= 1


@given(labelled_shards(), STRENGTHS, st.integers(0, 10**6))
def test_how_often_a_sample_occurs_does_not_depend_on_the_shards_it_was_packed_into(shards, strength, epoch):
    together = [np.concatenate(shards)]
    assert (
        times_of(shards, strength, epoch=epoch).tolist() == times_of(together, strength, epoch=epoch).tolist()
    )


@settings(deadline=None)
@given(labelled_shards(), STRENGTHS, st.integers(0, 2**63 - 1), st.integers(0, 100))
def test_every_sample_of_a_class_that_is_thinned_out_has_its_turn(shards, strength, seed, first):
    labels = np.concatenate(shards)
    counts = np.bincount(labels, minlength=CLASSES)
    totals = class_totals(counts, strength)
    epochs = {one: ceil(counts[one] / totals[one]) for one in np.unique(labels).tolist()}
    seen = np.cumsum(
        [times_of(shards, strength, seed=seed, epoch=first + one) for one in range(max(epochs.values()))],
        axis=0,
    )
    for one, needed in epochs.items():
        own = seen[needed - 1][labels == one]
        assert own.min() >= 1
        assert own.max() - own.min() <= 1  # and over the epochs nobody is preferred


def test_epochs_and_seeds_choose_other_samples():
    shards = [np.array([0] * 300 + [1] * 20)]
    chosen = {tuple(times_of(shards, 1.0, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(chosen) == 4


def dealt_before(rank, epoch, total, count, offset):
    """In Python's own integers, which have no end."""
    return (rank * total + epoch * total + offset) // count


@given(
    st.lists(st.lists(st.integers(0, 3 * 10**10), min_size=3, max_size=3), min_size=1, max_size=5),
    STRENGTHS,
    st.integers(0, 10**9),
)
def test_counts_of_tens_of_billions_are_dealt_out_to_the_last_sample(table, strength, epoch):
    table = np.array(table)
    counts = table.sum(axis=0).tolist()
    sizes = Occurrences(Balance(strength, table, lambda _: None), seed=3).shard_sizes(epoch)
    totals = class_totals(table.sum(axis=0), strength).tolist()
    draws = bit_stream(3, Purpose.BALANCE).random_raw(3).tolist()
    expected = [0] * len(table)
    for one, count in enumerate(counts):
        before = 0
        for shard, samples in enumerate(table[:, one].tolist()):
            if samples:
                turn = [epoch, totals[one], count, draws[one] % count]
                expected[shard] += dealt_before(before + samples, *turn) - dealt_before(before, *turn)
            before += samples
    assert sizes.tolist() == expected
    assert sizes.sum() == table.sum()


def test_a_table_that_is_worked_on_in_parts_gives_the_sizes_of_its_shards():
    """More than a million entries, of which the classes' totals are known."""
    rng = np.random.Generator(np.random.Philox(0))
    table = (rng.random((3000, 1000)) * 5).astype(np.int64)
    occurrences = Occurrences(Balance(1.0, table, lambda _: None), seed=0)
    sizes = occurrences.shard_sizes(0)
    assert sizes.sum() == table.sum()
    weights = class_totals(table.sum(axis=0), 1.0) / table.sum(axis=0)
    assert np.abs(sizes - table @ weights).max() < 1000  # less than one a class


def test_one_sample_that_makes_up_half_of_a_huge_epoch_needs_no_memory_for_its_copies():
    table = np.array([[0, 1], [2 * 10**9, 0]])
    occurrences = Occurrences(Balance(1.0, table, [np.array([1])].__getitem__), seed=0)
    size = int(occurrences.shard_sizes(0)[0])
    assert size in (10**9, 10**9 + 1)
    rows = occurrences.rows(0, 0, np.array([0, 1, size // 2, size - 1]))
    assert rows.rows.tolist() == [0] * 4
    assert len(set(rows.copies.tolist())) == 4
    assert rows.copies.max() < size


def test_rare_samples_and_their_copies_are_spread_over_their_shard():
    labels = np.zeros(10_000, np.int32)
    labels[::100] = 1
    occurrences = Occurrences(balance_of([labels], 1.0), seed=0)
    rows = occurrences.rows(0, 0, np.arange(10_000)).rows
    for start in range(0, 10_000, 200):
        window = rows[start : start + 200]
        assert 85 <= (labels[window] == 1).sum() <= 115
        assert max(Counter(window.tolist()).values()) <= 5  # each of the rare ones occurs fifty times


def test_batches_of_a_balanced_plan_hold_its_classes_as_evenly_as_independent_draws_would():
    rng = np.random.Generator(np.random.Philox(0))
    shards = [(rng.random(2000) < 0.02).astype(np.int32) for _ in range(20)]
    plan = Plan(
        np.full(20, 2000),
        seed=0,
        global_batch=64,
        lanes=8,
        shuffle_block=512,
        balance=balance_of(shards, 1.0),
    )
    labels = np.concatenate(shards)
    rare = np.array([labels[plan.batch(step)].sum() for step in range(2 * plan.steps_per_epoch)])
    assert abs(rare.mean() - 32) < 0.2
    assert rare.std() < 1.15 * 4  # of 64 throws of a coin


def test_the_labels_of_a_shard_are_asked_for_when_it_is_due_and_then_kept():
    shards = [np.array([0] * 40 + [1] * 10) for _ in range(8)]
    asked = []

    def labels_of(shard):
        asked.append(shard)
        return shards[shard]

    balance = Balance(1.0, class_table(shards, 2), labels_of)
    plan = Plan(np.full(8, 50), seed=0, global_batch=2, lanes=1, shuffle_block=16, balance=balance)
    assert asked == []
    plan.batch(0)
    assert 1 <= len(asked) <= 2
    for step in range(plan.steps_per_epoch):
        plan.batch(step)
    assert len(asked) == len(set(asked)) == 8


def test_labels_that_are_not_those_that_were_counted_are_our_own_mistake():
    balance = Balance(0.5, np.array([[2, 1]]), lambda _: np.array([0, 1, 1]))
    with pytest.raises(AssertionError):
        Occurrences(balance, 0).rows(0, 0, np.array([0]))


def test_a_class_table_counts_each_shard_by_itself():
    shards = [np.array([0, 2, 2], np.int32), np.array([], np.int32), np.array([1], np.int32)]
    assert class_table(shards, 4).tolist() == [[1, 0, 2, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert class_table([], 4).shape == (0, 4)


@pytest.mark.parametrize("stranger", [-1, 3])
def test_a_label_that_is_no_class_is_an_error_in_the_data(stranger):
    with pytest.raises(
        UserError, match=rf"sample 1 of shard 1 .* label {stranger}, the classes are 0 to 2"
    ) as found:
        class_table([np.array([0, 1]), np.array([2, stranger])], 3)
    assert found.value.code == "DATA"


def test_a_class_without_samples_is_left_out_and_divides_nothing_by_zero():
    with np.errstate(all="raise"):
        occurrences = Occurrences(balance_of([np.array([1, 1, 3])], 1.0), seed=0)
        assert occurrences.shard_sizes(2).tolist() == [3]
        assert sorted(occurrences.rows(2, 0, np.arange(3)).rows) == [0, 1, 2]
