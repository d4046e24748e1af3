"""Sums over processes and the proof that a split was seen whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.batch import Batch
from data_pipeline.plan import Work
from training.counts import (
    Certificate,
    SharedSums,
    add_to_runs,
    batch_digest,
    digest_parts,
    distinct,
    joined_digest,
)
from training.inputs import Inputs

DIGEST = st.integers(0, 2**64 - 1)


@given(DIGEST)
def test_a_digest_survives_being_cut_into_parts(digest):
    assert joined_digest(digest_parts(digest)) == f"{digest:016x}"


@given(st.lists(DIGEST, max_size=50))
def test_parts_add_up_to_the_digest_of_the_whole(digests):
    total = np.zeros(4)
    for digest in digests:
        total += digest_parts(digest)
    assert joined_digest(total.tolist()) == f"{sum(digests) % 2**64:016x}"


def test_parts_of_thousands_of_the_largest_digests_add_exactly_in_float64():
    digests = [2**64 - 1] * 5000 + np.random.default_rng(0).integers(0, 2**64, 5000, np.uint64).tolist()
    total = torch.zeros(4, dtype=torch.float64)
    for digest in digests:
        total += torch.tensor(digest_parts(digest), dtype=torch.float64)
    assert joined_digest(SharedSums(total).result()) == f"{sum(digests) % 2**64:016x}"


@given(st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=20), max_size=8))
def test_intervals_count_different_numbers_as_a_set_does(batches):
    runs = []
    for batch in batches:
        add_to_runs(runs, np.array(batch, np.int64))
    assert distinct(runs) == len({number for batch in batches for number in batch})


def test_a_split_read_in_order_is_one_interval():
    runs = []
    for first in range(0, 10_000, 100):
        add_to_runs(runs, np.arange(first, first + 100))
    assert runs == [(0, 10_000)]


@pytest.mark.parametrize(
    ("seen", "unique", "digest"), [(6, 6, "d"), (8, 7, "d"), (7, 6, "d"), (8, 8, "d"), (7, 7, "e")]
)
def test_a_certificate_that_does_not_hold_is_an_error(seen, unique, digest):
    with pytest.raises(RuntimeError, match="not of the whole split"):
        Certificate(7, seen, unique, digest).check("d")
    Certificate(7, 7, 7, "d").check("d")


def batch_of(keys, *, valid=True):
    work = Work(0, 0, 0, 1, np.arange(len(keys)), valid)
    images = torch.arange(len(keys) * 12, dtype=torch.uint8).reshape(len(keys), 2, 2, 3)
    targets = torch.arange(len(keys))
    return Batch(work, images, targets, torch.full((len(keys),), valid), list(keys))


def digest_of(batch, *, pixels, images=None, targets=None, share=None, partners=None):
    images = batch.images.float() if images is None else images
    targets = batch.targets if targets is None else targets
    share = torch.ones(len(targets)) if share is None else share
    inputs = Inputs(images, targets, batch.valid, batch.valid.float(), share, partners)
    return batch_digest(batch, inputs, pixels=pixels)


@pytest.mark.parametrize("pixels", [False, True])
def test_the_digest_of_a_batch_is_the_sum_of_its_pieces_in_any_order(pixels):
    whole = batch_of("abcd")
    pieces = []
    for rows in ([3, 1], [0], [2]):
        part = Batch(
            whole.work,
            whole.images[rows],
            whole.targets[rows],
            whole.valid[rows],
            [whole.keys[row] for row in rows],
        )
        pieces.append(digest_of(part, pixels=pixels))
    assert sum(pieces) % 2**64 == digest_of(whole, pixels=pixels)


def test_a_pixel_a_target_or_a_key_that_differs_changes_the_digest():
    batch = batch_of("abcd")
    reference = digest_of(batch, pixels=True)
    images, targets = batch.images.float(), batch.targets.clone()
    images[2, 1, 1, 0] += 1e-3
    targets[0] += 1
    found = {
        reference,
        digest_of(batch, pixels=True, images=images),
        digest_of(batch, pixels=True, targets=targets),
        digest_of(batch_of("abce"), pixels=True),
        digest_of(batch, pixels=False),
    }
    assert len(found) == 5
    assert digest_of(batch, pixels=False, images=images, targets=targets) == digest_of(batch, pixels=False)


def test_what_a_sample_is_mixed_with_and_how_much_is_in_the_digest():
    batch, partners = batch_of("abcd"), torch.tensor([1, 0, 3, 2])
    found = {
        digest_of(batch, pixels=True),
        digest_of(batch, pixels=True, partners=partners),
        digest_of(batch, pixels=True, partners=partners.flip(0)),
        digest_of(batch, pixels=True, partners=partners, share=torch.full((4,), 0.5)),
    }
    assert len(found) == 4


def test_a_stand_in_for_an_empty_share_counts_nothing():
    assert digest_of(batch_of("a", valid=False), pixels=True) == 0
    assert digest_of(batch_of("a"), pixels=True) != 0
