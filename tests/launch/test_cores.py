"""Which cores a process of a SLURM job takes, and how many threads it counts on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.cores import share_of


@given(st.sets(st.integers(0, 999), min_size=1, max_size=80), st.integers(1, 90))
def test_processes_that_share_all_cores_of_a_job_cut_them_up(allowed, processes):
    cores = sorted(allowed)
    shares = [
        share_of(cores, given=len(cores), processes=processes, number=number) for number in range(processes)
    ]
    assert len({share.cores for share in shares}) == 1
    if processes == 1 or processes > len(cores):
        assert all(not share.own for share in shares)
        assert shares[0].cores == (len(cores) if processes == 1 else 1)
        return
    assert [core for share in shares for core in sorted(share.own)] == cores
    assert {len(share.own) for share in shares} <= {shares[0].cores, shares[0].cores + 1}


@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=16, unique=True),
    st.integers(1, 64),
    st.integers(1, 8),
    st.data(),
)
def test_a_share_never_leaves_the_cores_that_are_allowed_nor_promises_more_than_was_given(
    allowed, cores, processes, data
):
    number = data.draw(st.integers(0, processes - 1))
    share = share_of(allowed, given=cores, processes=processes, number=number)
    assert share.own <= set(allowed)
    assert 1 <= share.cores <= len(allowed)
    assert share.cores == 1 or share.cores * processes <= cores


def test_what_slurm_has_bound_or_left_free_stays_where_it_is():
    assert share_of([5], given=2, processes=2, number=1) == (frozenset(), 1)
    assert share_of([4, 5], given=4, processes=2, number=1) == (frozenset(), 2)
    assert share_of(range(64), given=8, processes=2, number=1) == (frozenset(), 4)
    assert share_of(range(2), given=16, processes=2, number=1) == (frozenset(), 2)


def test_the_threads_of_one_core_stay_with_one_process():
    neighbours = [0, 32, 1, 33]
    assert share_of(neighbours, given=4, processes=2, number=0).own == {0, 32}
    assert share_of(neighbours, given=4, processes=2, number=1).own == {1, 33}


TAKES = """
import os
from launch.cores import take_cores
take_cores(os.environ)
print(*os.sched_getaffinity(0), ":", os.environ.get("LOCKSTEP_CORES"))
"""


def takes(**env):
    """The cores that a process keeps with these variables, and how many it may count on."""
    known = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    words = [sys.executable, "-c", TAKES]
    done = subprocess.run(words, env=known | env, capture_output=True, text=True, check=True)
    cores, _, told = done.stdout.partition(":")
    return set(map(int, cores.split())), told.strip()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_processes_of_a_job_take_half_of_its_cores_each():
    allowed = os.sched_getaffinity(0)
    local = {"LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_ON_NODE": str(len(allowed))}
    halves = []
    for rank in ("0", "1"):
        cores, told = takes(**local, LOCAL_RANK=rank)
        halves.append(cores)
        assert int(told) == len(allowed) // 2 <= len(cores)
    assert halves[0] | halves[1] == allowed
    assert not halves[0] & halves[1]


@pytest.mark.parametrize("given_cores", ["", "0", "-1", "x", "$(touch x)", "9" * 5000])
def test_without_a_word_of_slurm_processes_stay_where_they_are(given_cores):
    allowed = os.sched_getaffinity(0)
    assert takes(LOCAL_WORLD_SIZE="2", SLURM_CPUS_ON_NODE=given_cores) == (allowed, "None")
