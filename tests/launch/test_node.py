"""Our own launcher on one machine: how it sees processes out, and whole runs that it starts again."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.attempts import LAUNCHES
from launch.children import Children, Others, Plan, see_out
from launch.command import Command
from launch.ends import End, outcome_of, outcome_of_agent
from launch.stop_signals import Asked, StopSignals
from tests.marked_processes import DEADLINE, living, wait_until
from tests.real_jobs import (
    BIN,
    EVERY,
    EXACT,
    READY,
    begin,
    check_same,
    clear_away,
    last_step,
    records,
)
from training.vigil.ending import EXIT_CODES

SAYS = {"rank": 1, "host": "h", "what": "ValueError: boom", "hint": "h", "step": 3}


def plan(rank, code, **variables):
    return Plan(rank, Command((sys.executable, "-c", code), {"RANK": str(rank)}), variables)


def seen_out(*codes, asked=(), others=None):
    """The ends of processes that run these programs; `asked`: (seconds, signal) to this one meanwhile."""
    with StopSignals() as signals:
        for seconds, number in asked:
            threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
        began = time.monotonic()
        with Children() as children:
            for rank, code in enumerate(codes):
                children.start(plan(rank, code))
            see_out(children, signals, others or Others())
        return children.ends, time.monotonic() - began


def test_each_process_keeps_its_exit_code():
    ends, _ = seen_out("raise SystemExit(75)", "pass", "import os; os.kill(os.getpid(), 11)")
    assert {end.rank: end.code for end in ends} == {0: 75, 1: 0, 2: -11}
    assert not any(end.ours for end in ends)


def test_who_outlives_a_failure_is_killed_after_a_while_also_where_signals_are_ignored():
    stubborn = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(60)"
    ends, seconds = seen_out("raise SystemExit(70)", stubborn)
    assert ends == [End(0, 70), End(1, -9, ours=True)]
    assert 3 < seconds < 8


def test_those_who_wait_for_the_first_to_name_a_mistake_are_told_once_it_has():
    waits = "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(3))\ntime.sleep(60)"
    ends, _ = seen_out("import time\ntime.sleep(2)\nraise SystemExit(2)", waits, waits)
    assert [(end.rank, end.code, end.ours) for end in sorted(ends)] == [
        (0, 2, False),
        (1, 3, False),
        (2, 3, False),
    ]
    assert outcome_of(ends, None, [], learning=True).exit_code == 2
    ends, _ = seen_out(waits, "import time\ntime.sleep(2)\nraise SystemExit(2)")
    assert sorted(ends)[0].ours, "of another one's mistake the first hears from itself"


def test_a_failure_elsewhere_ends_the_processes_here():
    class Elsewhere(Others):
        def failed(self):
            return True

    ends, seconds = seen_out("import time\ntime.sleep(60)", others=Elsewhere())
    assert ends == [End(0, -9, ours=True)]
    assert seconds < 8


def test_signals_are_passed_on_to_every_process():
    code = "import signal, sys\nsignal.signal(10, lambda *_: sys.exit(75))\nsignal.pause()"
    ends, seconds = seen_out(code, code, asked=[(1.5, signal.SIGUSR1)])
    assert sorted(end.code for end in ends) == [75, 75]
    assert seconds < 6


def test_the_second_interrupt_ends_even_those_that_do_not_listen():
    code = "import signal, time\nsignal.signal(2, signal.SIG_IGN)\ntime.sleep(60)"
    ends, seconds = seen_out(code, asked=[(1, signal.SIGINT), (1.3, signal.SIGINT)])
    assert [end.code for end in ends] == [-9]
    assert seconds < 6
    assert outcome_of(ends, None, [2, 2], learning=True).exit_code == 130


def test_nothing_is_left_where_the_launcher_does_not_see_it_out():
    children = Children()
    with children:
        children.start(plan(0, "import time\ntime.sleep(60)"))
    assert children.collect() == [End(0, -9, ours=True)]


def test_processes_do_not_take_an_outer_launchers_place(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "7")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "outer")
    code = "import os\nassert not {'WORLD_SIZE', 'TORCHELASTIC_RUN_ID'} & set(os.environ), os.environ"
    assert seen_out(code)[0] == [End(0, 0)]


def test_a_program_that_is_not_there_is_the_users_to_mend():
    from data_pipeline.fault import UserError

    with Children() as children, pytest.raises(UserError, match="process 3 cannot be started"):
        children.start(Plan(3, Command(("/nowhere/python",)), {}))


def test_signals_raise_only_where_nothing_runs_and_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.take() == [signal.SIGTERM]
        with pytest.raises(Asked), signals.raising():
            pass
        assert signals.asked
        assert not signals.at_once
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_hang_up_that_was_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.asked
    finally:
        signal.signal(signal.SIGHUP, before)


# How a start ended.


@pytest.mark.parametrize(
    ("ends", "name", "passed_on", "code", "spoken"),
    [
        ([End(0, 0), End(1, 0)], None, [], 0, True),
        ([End(0, 0), End(1, 75)], "STOPPED", [15], 75, True),
        ([End(1, -9), End(0, 70)], "CRASH", [], 70, True),
        ([End(1, -9), End(0, 71)], "HANG", [], 71, True),
        ([End(1, 3), End(0, 70)], "CRASH", [], 3, True),
        ([End(0, 2), End(1, 2)], None, [], 2, True),
        ([End(0, -11)], None, [], 70, False),
        ([End(0, -9)], None, [15], 70, False),
        ([End(0, 1)], None, [], 1, False),
        ([End(0, -15)], None, [15], 75, False),
        ([End(0, -2)], None, [2], 130, True),
        ([End(0, 70), End(1, -9, ours=True)], None, [], 70, True),
        ([End(1, -9, ours=True), End(0, 71)], None, [], 71, True),
        ([End(0, 130), End(1, -9, ours=True)], "STOPPED", [2, 2], 130, True),
    ],
)
def test_an_exit_code_is_never_flattened(ends, name, passed_on, code, spoken):
    failure = {**SAYS, "code": name} if name else None
    outcome = outcome_of(ends, failure, passed_on, learning=True)
    assert (outcome.exit_code, outcome.spoken) == (code, spoken)


@given(
    st.lists(
        st.builds(
            End,
            st.integers(0, 7),
            st.sampled_from([*EXIT_CODES.values(), 0, 2, 3, 130, -9, -11]),
            st.booleans(),
        ),
        min_size=1,
    ),
    st.sampled_from([None, *EXIT_CODES]),
)
def test_a_start_is_good_only_where_every_process_was(ends, name):
    outcome = outcome_of(ends, {**SAYS, "code": name} if name else None, [], learning=True)
    assert (outcome.exit_code == 0) == all(end.code == 0 for end in ends)
    assert 0 <= outcome.exit_code < 256
    assert outcome.exit_code in {75, 0} or any(end.code not in (0, 75) for end in ends)


@pytest.mark.parametrize(
    ("code", "name", "passed_on", "result"),
    [(0, None, [], 0), (1, "STOPPED", [15], 75), (1, "HANG", [], 71), (1, None, [], 1), (-9, None, [], 70)],
)
def test_what_others_flatten_is_put_right(code, name, passed_on, result):
    failure = {**SAYS, "code": name} if name else None
    assert outcome_of_agent(End(0, code), failure, passed_on, agent="torchrun").exit_code == result


# Whole runs. What each signal does to whom is in test_signals.py.


def ours(*options):
    return [BIN / "lockstep", "launch", "--cpu", *options, "--", "train"]


def training(job, beyond=READY - 1):
    """Wait until the job is beyond this step."""
    assert wait_until(lambda: last_step(job.run_dir) > beyond or job.process.poll()) is True, job.text()


def children_of(job):
    """The launcher's processes, in the order in which it has started them."""
    path = Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children")
    return [int(number) for number in path.read_text().split()]


def launches(job):
    return [json.loads(line) for line in (job.run_dir / LAUNCHES).read_text().splitlines()]


@pytest.mark.slow
def test_after_a_kill_the_run_goes_on_by_itself_and_a_lone_process_is_spoken_for(alone, digits, tmp_path):
    """Two jobs side by side: process 1 of 2 is killed; the only process of the other breaks, for good."""
    options = ["--processes-per-node", "2", "--max-restarts", "3"]
    two = begin(ours(*options), tmp_path / "two", digits=digits, pace=0.05, more=[*EXACT, "--fresh"])
    one = begin(ours(), tmp_path / "one", digits=digits, pace=0.3)
    try:
        for job, number in ((two, signal.SIGKILL), (one, signal.SIGSEGV)):
            training(job)
            os.kill(children_of(job)[-1], number)
        assert one.process.wait(timeout=DEADLINE) == 70, one.text()
        what, fatal = (tmp_path / "one" / "job.err").read_text().splitlines()
        assert what == "error: process 0 was killed by signal 11 (SIGSEGV)"
        assert fatal.startswith("FATAL code=CRASH rank=0 ")
        assert json.loads((one.run_dir / "failure.json").read_text())["what"] == what

        assert two.process.wait(timeout=DEADLINE) == 0, two.text()
        found = re.search(
            r"start 2 of 4: process 1 on .* was killed by signal 9 .* from step (\d+)", two.text()
        )
        assert int(found[1]) >= EVERY
        assert [(entry["start"], entry["processes"]) for entry in launches(two)] == [(0, 2), (1, 2)]
        assert len(records(two.run_dir, "start")) == 2
        check_same(two.run_dir, alone)
    finally:
        for job in (two, one):
            clear_away(job)


def breaking(folder, condition):
    """What stands before a command whose Pythons end at once, without a word, where `condition` holds."""
    (folder / "broken").mkdir()
    text = f"import os, sys\nif {condition}: os._exit(9)\n"
    (folder / "broken" / "sitecustomize.py").write_text(text)
    return ["env", f"PYTHONPATH={folder / 'broken'}"]


@pytest.mark.slow
def test_an_old_run_is_moved_aside_once_also_where_the_first_start_fails_before_that(digits, tmp_path):
    old = tmp_path / "run" / "checkpoints" / "step-00000007"
    old.mkdir(parents=True)
    (old / "MANIFEST.json").write_text("{}")
    (tmp_path / "run" / "config.yaml").write_text("old")
    command = [*breaking(tmp_path, "os.environ.get('LOCKSTEP_START') == '0'"), *ours("--max-restarts", "1")]
    job = begin(command, tmp_path, digits=digits, more=["--fresh", "--train.max-steps", "2"])
    try:
        assert job.process.wait(timeout=DEADLINE) == 0, job.text()
        assert "without a word; from the beginning" in job.text()
        (moved,) = tmp_path.glob("run.old-*")
        assert (moved / "config.yaml").read_text() == "old"
        assert len(records(job.run_dir)) == 2
    finally:
        clear_away(job)


@pytest.mark.slow
def test_three_starts_without_progress_are_enough(digits, tmp_path):
    """A lone process that ends, without a word, before it has done a step."""
    command = [
        *breaking(tmp_path, "'training/run.py' in ' '.join(sys.orig_argv)"),
        *ours("--max-restarts", "9"),
    ]
    job = begin(command, tmp_path, digits=digits)
    try:
        assert job.process.wait(timeout=DEADLINE) == 70, job.text()
        said = (tmp_path / "job.err").read_text().splitlines()
        assert [line[:13] for line in said[:2]] == ["start 2 of 10", "start 3 of 10"]
        assert "process 0 ended with exit code 9, without a word; from the beginning" in said[0]
        assert "error: no progress in 3 starts" in said[2]
        assert said[3].startswith("FATAL code=CRASH rank=0 ")
        assert len(launches(job)) == 3
    finally:
        clear_away(job)


@pytest.mark.slow
def test_under_another_launcher_a_stop_is_a_stop_and_our_end_leaves_nobody(digits, tmp_path):
    """Two jobs side by side: one hears a signal that torchrun would die of, of the other we are killed."""
    options = ["--processes-per-node", "2", "--with"]
    asked = begin(ours(*options, "torchrun"), tmp_path / "asked", digits=digits, pace=0.2)
    killed = begin(ours(*options, "accelerate"), tmp_path / "killed", digits=digits, pace=0.2)
    try:
        training(asked)
        training(killed)
        asked.process.send_signal(signal.SIGUSR1)
        killed.process.kill()
        assert wait_until(lambda: not living(killed.mark) or None, within=10), killed.text()
        assert asked.process.wait(timeout=DEADLINE) == 75, asked.text()
        assert json.loads((asked.run_dir / "failure.json").read_text())["code"] == "STOPPED"
    finally:
        clear_away(asked)
        clear_away(killed)
