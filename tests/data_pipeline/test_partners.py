import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.batch import Pixels
from data_pipeline.partners import mix_rows, partner_rows, partner_targets, wanted
from data_pipeline.plan import Work

KEYED = {"seed": 3, "mixup": 0.4, "cutmix": 1.0}


def work_of(batch, first, last):
    """Rows `first` to `last` of a global batch, whose partners stand beside each other."""
    beside = [position ^ 1 if position ^ 1 < len(batch) else position for position in range(len(batch))]
    partners = batch[beside]
    return Work(0, 5, 0, 1, batch[first:last], True, first, None, partners[first:last])


def images_of(numbers):
    """An image a sample that is another for each of them."""
    draws = np.random.default_rng(0).integers(0, 256, (1000, 6, 6, 3), np.uint8)
    return draws[numbers]


def mixed(batch, first, last):
    work = work_of(batch, first, last)
    numbers = wanted(work).numbers
    images = images_of(numbers[: last - first]).copy()
    beyond = [Pixels(image) for image in images_of(numbers[last - first :])]
    share = mix_rows(work, images, None, beyond, **KEYED)
    return images, partner_targets(work, numbers), share


@given(size=st.integers(2, 17), cuts=st.sets(st.integers(1, 16), max_size=6))
def test_however_a_global_batch_is_cut_each_sample_is_mixed_with_the_same_other(size, cuts):
    batch = np.random.default_rng(size).permutation(1000)[:size]
    ends = [0, *sorted(cut for cut in cuts if cut < size), size]
    pieces = [mixed(batch, first, last) for first, last in itertools.pairwise(ends)]
    together = mixed(batch, 0, size)
    for column, whole in enumerate(together):
        assert np.array_equal(np.concatenate([piece[column] for piece in pieces]), whole)


def test_only_the_pairs_that_are_cut_apart_are_read_twice():
    batch = np.arange(10, 26)
    assert wanted(work_of(batch, 0, 16)).numbers.tolist() == batch.tolist()
    assert wanted(work_of(batch, 3, 7)).numbers.tolist() == [13, 14, 15, 16, 12, 17]
    assert partner_rows(work_of(batch, 3, 7)).tolist() == [4, 2, 1, 5]


def test_the_last_of_an_odd_batch_stays_as_it_is():
    batch = np.arange(5)
    images, targets, share = mixed(batch, 0, 5)
    assert np.array_equal(images[4], images_of(batch)[4])
    assert (targets[4], share[4]) == (4, 1)
    assert not np.array_equal(images[:4], images_of(batch)[:4])


def test_the_same_sample_twice_in_a_batch_is_mixed_with_its_other_copy():
    """A balanced epoch may put two copies of a sample beside each other; they are not one and the same."""
    work = Work(0, 0, 0, 1, np.array([7, 7]), True, 0, np.array([0, 1]), np.array([7, 7]), np.array([1, 0]))
    assert partner_rows(work).tolist() == [1, 0]
    assert wanted(work).copies.tolist() == [0, 1]


@pytest.mark.parametrize("copies", [None, np.array([0, 2])])
def test_without_mixing_a_work_wants_its_own_samples_only(copies):
    work = Work(0, 0, 0, 1, np.array([4, 9]), True, 0, copies)
    assert wanted(work).numbers.tolist() == [4, 9]
    assert wanted(work).copies.tolist() == ([0, 0] if copies is None else [0, 2])
