import threading
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.draws import Purpose, bit_stream, hash64, permutation


@given(st.integers(0, 2000), st.integers(0, 2**63 - 1))
def test_a_permutation_holds_every_number_once(count, seed):
    order = permutation(count, bit_stream(seed, Purpose.SHARD_ORDER))
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))


def test_the_bits_are_those_that_recorded_runs_were_made_with():
    stream = bit_stream(1, Purpose.AUGMENTATION, 2, at=(3, 4))
    assert stream.random_raw(3).tolist() == [15941837809723923522, 13471801767320865036, 2956086241322434811]
    assert permutation(10, bit_stream(0, Purpose.PACKING)).tolist() == [5, 6, 4, 0, 3, 2, 8, 1, 9, 7]
    assert hash64(b"lock", b"step") == 9624280957897112799


def test_uniform_numbers_are_those_that_recorded_runs_were_made_with():
    draws = np.random.Generator(bit_stream(1, Purpose.AUGMENTATION, 2, at=(3, 4)))
    assert draws.random(2).tolist() == [0.8642087593357116, 0.730307837171167]


def test_streams_that_differ_in_any_part_of_their_name_share_no_draw():
    names = [(seed, purpose, epoch) for seed in (0, 1) for purpose in Purpose for epoch in (0, 1, 255, 256)]
    streams = [bit_stream(*name, at=at) for name in names for at in ((0, 0), (1, 0), (0, 1))]
    drawn = [set(stream.random_raw(50).tolist()) for stream in streams]
    assert all(len(numbers) == 50 for numbers in drawn)
    assert not any(one & other for one, other in combinations(drawn, 2))


def test_a_long_stream_does_not_run_into_the_next_one():
    first = set(bit_stream(0, Purpose.AUGMENTATION, at=(0, 0)).random_raw(200_000).tolist())
    second = set(bit_stream(0, Purpose.AUGMENTATION, at=(1, 0)).random_raw(200_000).tolist())
    assert not first & second


def test_draws_do_not_depend_on_the_thread_or_on_the_global_generator():
    found = []

    def draw():
        np.random.seed(len(found))  # as a user's code may do at any time
        found.append(bit_stream(5, Purpose.ROTATION).random_raw(4).tolist())

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [bit_stream(5, Purpose.ROTATION).random_raw(4).tolist()] * 4


@pytest.mark.parametrize("parts", [(b"",), (b"key",), (b"a", b"bc")])
def test_a_hash_is_64_bits_of_the_joined_parts(parts):
    assert 0 <= hash64(*parts) < 2**64
    assert hash64(*parts) == hash64(b"".join(parts))
    assert hash64(*parts) != hash64(*parts, b"x")
