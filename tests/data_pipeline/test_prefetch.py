"""The prefetching thread against a real server."""

from __future__ import annotations

import random
import threading
import time
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.fault import UserError
from data_pipeline.index import Shard, Split
from data_pipeline.prefetch import Coming, Prefetcher, shards_in_order
from data_pipeline.store import open_store
from data_pipeline.transfer import Patience

SIZE, SAMPLES = 50_000, 4


@pytest.fixture
def server(serve, tmp_path):
    root = tmp_path / "served"
    root.mkdir()
    for number in range(12):
        (root / f"{number}.tar").write_bytes(random.Random(number).randbytes(SIZE))
        (root / f"{number}.idx").write_bytes(b"index %d" % number)
    return serve(root)


@pytest.fixture
def split(server):
    shards = []
    for number in range(12):
        sums = [
            sha256((server.root / f"{number}.{kind}").read_bytes()).hexdigest() for kind in ("tar", "idx")
        ]
        shards.append(Shard(f"{number}.tar", SAMPLES, SIZE, *sums))
    return Split(tuple(shards), (12 * SAMPLES,), "0" * 16)


def store_of(server, tmp_path, **options):
    patience = Patience(tries=2, seconds=5.0, pause=0.01)
    return open_store(server.url, cache=tmp_path / "cache", patience=patience, **options)


def batches(order):
    """Two micro-batches for each shard of `order`."""
    for shard in order:
        yield np.array([SAMPLES * shard, SAMPLES * shard + 1])
        yield np.array([SAMPLES * shard + 2, SAMPLES * shard + 3])


def fetched(server):
    return [int(request.path[1:-4]) for request in list(server.log) if request.path.endswith("tar")]


def settled(server):
    """What was fetched, once nothing more comes."""
    before = None
    while before != (before := fetched(server)) or not before:
        time.sleep(0.15)
    return before


@pytest.fixture
def prefetcher():
    started = []

    def start(*arguments, **options):
        started.append(Prefetcher(*arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


ORDER = [7, 2, 9, 0, 11, 4, 1, 3]


def test_the_next_shards_are_fetched_in_the_order_of_the_plan_and_no_more(
    server, split, tmp_path, prefetcher
):
    ahead = prefetcher(store_of(server, tmp_path), split, batches(ORDER), ahead=3)
    assert settled(server) == ORDER[:3]
    ahead.taken()
    assert settled(server) == ORDER[:4]  # the shard of the batch that was taken is being read
    ahead.taken()
    assert settled(server) == ORDER[:4]
    for _ in range(20):
        ahead.taken()
    assert set(settled(server)) <= set(ORDER)
    assert not ahead._thread.is_alive()


def test_a_reader_that_follows_finds_everything_fetched_once(server, split, tmp_path, prefetcher):
    store = store_of(server, tmp_path)
    ahead = prefetcher(store, split, batches(ORDER), ahead=2)
    for shard in ORDER:
        for _ in range(2):
            path = store.shard_path(split.shards[shard])
            assert path.read_bytes() == (server.root / f"{shard}.tar").read_bytes()
            assert store.index_path(split.shards[shard]).read_bytes() == b"index %d" % shard
            ahead.taken()
    assert sorted(fetched(server)) == sorted(ORDER)


@pytest.mark.parametrize("case", [(8, 1, 4), (8, 2, 2), (3, 1, 1), (1, 1, 0)])
def test_no_more_is_fetched_than_half_of_ones_part_of_the_cache(server, split, tmp_path, prefetcher, case):
    shards, sharers, expected = case
    store = store_of(server, tmp_path, cache_bytes=shards * SIZE)
    prefetcher(store, split, batches(ORDER), ahead=6, sharers=sharers)
    if not expected:
        time.sleep(0.3)
        assert fetched(server) == []
    else:
        assert settled(server) == ORDER[:expected]


def test_a_shard_that_cannot_be_fetched_stops_neither_the_thread_nor_the_reader(
    server, split, tmp_path, prefetcher
):
    server.behave("/2.tar", status=404)
    server.behave("/9.idx", drop_after=1)
    prefetcher(store_of(server, tmp_path), split, batches(ORDER), ahead=4)
    assert [number for number in settled(server) if number != 2] == [7, 0]


def test_a_plan_that_cannot_be_read_ends_the_thread_quietly(server, split, tmp_path, prefetcher, capfd):
    def broken():
        yield from batches(ORDER[:1])
        raise UserError("no labels", mend="none")

    ahead = prefetcher(store_of(server, tmp_path), split, broken(), ahead=3)
    assert settled(server) == ORDER[:1]
    ahead.close()
    assert not ahead._thread.is_alive()
    assert capfd.readouterr().err == ""


def test_closing_is_prompt_whatever_the_thread_is_at(server, split, tmp_path, prefetcher):
    for state in ({"bytes_a_second": 5}, {"status": 503, "retry_after": "50"}, {"slow_header": True}):
        server.behave("/7.tar", **state)
        ahead = prefetcher(store_of(server, tmp_path), split, batches(ORDER), ahead=1)
        time.sleep(0.2)
        began = time.monotonic()
        ahead.close()
        assert time.monotonic() - began < 2
    idle = prefetcher(store_of(server, tmp_path), split, batches([0]), ahead=1)
    settled(server)
    idle.close()
    assert not idle._thread.is_alive()


def test_a_plan_without_end_whose_shards_are_all_there_does_not_keep_the_thread_busy(
    server, split, tmp_path, prefetcher
):
    asked = []

    def endless():
        while True:
            asked.append(0)
            yield np.array([0, SAMPLES])

    ahead = prefetcher(store_of(server, tmp_path), split, endless(), ahead=2)
    settled(server)
    before = len(asked)
    time.sleep(0.2)
    assert len(asked) == before
    ahead.close()
    assert not ahead._thread.is_alive()


def test_a_folder_of_this_machine_needs_no_thread(server, split):
    before = threading.active_count()
    local = Prefetcher(open_store(server.root), split, batches(ORDER), ahead=3)
    assert threading.active_count() == before
    local.taken()
    local.close()


def test_shards_come_when_a_batch_first_needs_them_and_again_after_a_while_without():
    ends = np.cumsum([2, 0, 3, 1])
    numbers = [np.array([4, 0]), np.array([1]), np.array([5]), np.array([2, 3]), np.array([0])]
    assert list(shards_in_order(numbers, ends, window=9)) == [Coming(0, 0), Coming(0, 2), Coming(2, 3)]
    again = [Coming(0, 0), Coming(0, 2), Coming(2, 3), Coming(3, 2), Coming(4, 0)]
    assert list(shards_in_order(numbers, ends, window=2)) == again


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), max_size=30),
    st.integers(1, 8),
)
def test_no_batch_needs_a_shard_that_did_not_come_in_its_window(sizes, drawn, window):
    ends = np.cumsum(sizes)
    numbers = [np.array(one) % ends[-1] for one in drawn]
    coming = list(shards_in_order(numbers, ends, window=window))
    assert coming == sorted(coming)
    seen = {}
    expected = []
    for array, one in enumerate(numbers):
        for shard in sorted({int(np.flatnonzero(ends > number)[0]) for number in one}):
            if shard not in seen or array - seen[shard] > window:
                expected.append(Coming(array, shard))
            seen[shard] = array
    assert coming == expected
