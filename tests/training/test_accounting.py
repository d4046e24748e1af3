"""The end of a run says where its time went, and names what to change: a table of cases."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.accounting import ADVICE, NAMES, TOO_MUCH, Machine, Spent, account
from training.command import read_request
from training.stopwatch import BESIDE, PARTS

CPU = Machine(device="cpu", processes=2, cores=4, threads=4)
GPU = Machine(device="cuda", processes=8, cores=12, threads=1)


def spent(host="a", **seconds):
    return Spent(host, {**dict.fromkeys((*PARTS, *BESIDE), 0.0), **seconds})


def lines(everyone, flags="", machine=CPU):
    return account(everyone, read_request(flags.split()).config, machine)


@pytest.mark.parametrize(
    ("seconds", "flags", "machine", "bottleneck"),
    [
        (
            {"compute": 61, "data": 30, "reduce": 9},
            "--data.workers 1",
            CPU,
            "waiting for data; raise --data.workers (1 now, 4 cores a process)",
        ),
        (
            {"compute": 61, "data": 30},
            "--data.workers 0",
            Machine("cpu", 1, 1, 1),
            "waiting for data; raise --data.workers (0 now, 1 core)",
        ),
        (
            {"compute": 61, "data": 30},
            "--data.workers 4",
            CPU,
            "waiting for data; all of 4 cores a process read: lockstep pack --resize-shorter, or cheaper "
            "transforms",
        ),
        (
            {"compute": 61, "data": 30},
            "--data.workers 2 --data.root https://host/set",
            GPU,
            "waiting for data; raise --data.workers (2 now, 12 cores a process), or bring https://host/set "
            "nearer",
        ),
        ({"compute": 60, "copy": 40}, "", CPU, "preparing batches; crop smaller pictures"),
        (
            {"compute": 60, "copy": 40},
            "",
            GPU,
            "preparing batches; crop smaller pictures, or start fewer processes on a machine",
        ),
        (
            {"compute": 60, "reduce": 40},
            "--train.global-batch 96",
            GPU,
            "reducing; raise --train.global-batch (96 now), or start fewer processes (8 now)",
        ),
        (
            {"compute": 60, "reduce": 40},
            "--train.exact",
            CPU,
            "reducing; raise --train.global-batch (64 now), or start fewer processes (2 now), or leave "
            "--train.exact",
        ),
        (
            {"compute": 60, "optimizer": 40},
            "",
            CPU,
            "updating; set --optim.arguments '{fused: true}'",
        ),
        (
            {"compute": 60, "optimizer": 40},
            "--optim.name lamb",
            GPU,
            "updating; raise --train.global-batch (64 now), or use a simpler rule than lamb",
        ),
        (
            {"compute": 60, "checkpoint": 40},
            "--checkpoint.every-steps 10",
            CPU,
            "saving; raise --checkpoint.every-steps (10 now)",
        ),
        (
            {"compute": 60, "checkpoint": 40},
            "--checkpoint.every-minutes 0.5",
            CPU,
            "saving; raise --checkpoint.every-minutes (0.5 now)",
        ),
        ({"compute": 60, "checkpoint": 40}, "", CPU, "saving; raise --eval.every-epochs (1 now)"),
        (
            {"compute": 60, "other": 40},
            "",
            CPU,
            "bookkeeping; raise --train.global-batch (64 now) or --log.every-steps (1 now)",
        ),
        (
            {"compute": 60, "other": 40},
            "--debug.batch-digest pixels",
            CPU,
            "bookkeeping; leave --debug.batch-digest",
        ),
        ({"compute": 60, "evaluation": 40}, "", CPU, "evaluating; raise --eval.every-epochs (1 now)"),
        (
            {"compute": 80, "data": 9, "optimizer": 29, "evaluation": 20},
            "",
            CPU,
            "computing, as it should be; use a GPU, or more machines",
        ),
        (
            {"compute": 100, "start": 500},
            "",
            Machine("cpu", 1, 8, 1),
            "computing, as it should be; use a GPU, or OMP_NUM_THREADS=8 (1 now)",
        ),
        (
            {"compute": 100},
            "--model.compile",
            GPU,
            "computing, as it should be; try --train.precision bf16, --model.channels-last",
        ),
        (
            {"compute": 100},
            "--model.compile --model.channels-last --train.precision fp16",
            GPU,
            "computing, as it should be; use more GPUs",
        ),
    ],
)
def test_the_bottleneck_is_named_with_what_to_change(seconds, flags, machine, bottleneck):
    overview, found = lines([spent(**seconds)], flags, machine)
    assert overview.startswith("time      ")
    assert found == f"          bottleneck: {bottleneck}"


def test_the_overview_tells_the_largest_shares_of_the_whole_time():
    seconds = {"compute": 49.2, "data": 20, "evaluation": 15, "start": 8, "reduce": 6, "optimizer": 1.8}
    overview, _ = lines([spent(**seconds)])
    assert overview == (
        "time      1 min 40 s: 49 % computing, 20 % waiting for data, 15 % evaluating, 16 % rest"
    )
    assert lines([spent(compute=7384)])[0] == "time      2 h 3 min: 100 % computing"
    assert lines([spent(compute=9.94, start=0.06)])[0] == "time      10.0 s: 99 % computing, 1 % rest"


def test_the_process_that_waits_least_for_the_others_sets_the_pace():
    saving = spent("a", compute=60, checkpoint=30, reduce=10)
    waiting = spent("b", compute=60, reduce=40)
    _, found = lines([saving, waiting, waiting])
    assert "bottleneck: saving; " in found


@pytest.mark.parametrize(
    ("part", "name", "look"),
    [
        ("data", "waiting for data", "its disk, network and free cores"),
        ("copy", "preparing batches", "its free cores, and its way to the device"),
        ("compute", "computing", "its device, the clock rate, and what else runs there"),
    ],
)
def test_a_process_that_holds_the_others_up_is_named_with_its_host(part, name, look):
    rest = {"data": 10, "copy": 5, "compute": 40}
    quick = spent("node1", **{**rest, "reduce": 45})
    slow = spent("node2", **{**rest, part: rest[part] + 44, "reduce": 1})
    _, found = lines([quick, quick, quick, slow], machine=GPU)
    own, usual = rest[part] + 44, rest[part]
    assert found == (
        f"          bottleneck: process 3 on node2, {own} % {name}, the others {usual} %; look at {look}"
    )


def test_processes_that_are_slow_alike_hold_nobody_up():
    everyone = [spent("a", data=30, compute=60, reduce=10), spent("b", data=34, compute=58, reduce=8)]
    assert "bottleneck: waiting for data; raise" in lines(everyone)[1]


def test_a_start_that_took_no_step_says_nothing():
    assert lines([spent(start=3, evaluation=2)]) == []


def test_every_part_has_a_name_and_something_to_change():
    assert NAMES.keys() == {*PARTS, *BESIDE}
    assert TOO_MUCH.keys() | {"compute"} == ADVICE.keys() == NAMES.keys() - {"start"}


amounts = st.fixed_dictionaries({part: st.floats(0, 1e5) for part in (*PARTS, *BESIDE)})


@given(st.lists(st.builds(Spent, st.just("host"), amounts), min_size=1, max_size=5))
def test_whatever_was_counted_there_are_two_lines_or_none(everyone):
    found = lines(everyone)
    assert found == [] or (len(found) == 2 and "bottleneck: " in found[1] and "\n" not in "".join(found))
