"""When a job starts again by itself: a pure decision, over all that it depends on."""

from __future__ import annotations

import signal
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.attempts import stuck
from launch.slurm.lead import Lead, given_lead, needed, save_seconds, warning
from launch.slurm.outcome import outcome_of
from launch.slurm.requeue import Situation, decide
from launch.slurm.scontrol import parse_job, parse_lead
from launch.slurm.step import StepEnd, Told, note
from training.vigil.ending import EXIT_CODES

ENDINGS = {"": 0, "USAGE": 2, **EXIT_CODES}
SITUATIONS = st.builds(
    lambda name, **rest: Situation(exit_code=ENDINGS[name], name=name, **rest),
    name=st.sampled_from(list(ENDINGS)),
    mode=st.sampled_from(["train", "evaluate", "predict"]),
    node_lost=st.booleans(),
    terminated=st.booleans(),
    time_is_over=st.booleans(),
    stuck=st.booleans(),
    state=st.sampled_from([None, "RUNNING", "COMPLETING", "CANCELLED"]),
    allowed=st.booleans(),
    batch=st.booleans(),
)


@settings(max_examples=1000)
@given(SITUATIONS)
def test_a_job_is_requeued_only_where_another_start_goes_on_and_nobody_else_has_decided(situation):
    decision = decide(situation)
    if decision.requeue:
        assert situation.mode == "train"
        assert situation.allowed
        assert situation.batch
        assert not situation.stuck
        assert situation.exit_code != 0
        # STOPPED is written behind a committed checkpoint, or before training began.
        assert situation.name in ("STOPPED", "RENDEZVOUS") or situation.node_lost
        assert situation.time_is_over or not situation.terminated
        assert situation.time_is_over or situation.state in (None, "RUNNING")
        assert decision.words == ""
    if decision.exit_code != situation.exit_code:
        assert (situation.stuck, decision.exit_code) == (True, 70)
        assert decision.words == "no progress in 3 starts"
    if situation.exit_code == 0:
        assert decision.exit_code == 0
        assert not decision.requeue


@given(SITUATIONS)
def test_a_run_that_stopped_is_requeued_or_a_person_is_told_why_not(situation):
    decision = decide(situation)
    if situation.mode == "train" and situation.name in ("STOPPED", "RENDEZVOUS"):
        assert decision.requeue == (decision.words == "")
    else:
        assert decision.exit_code == situation.exit_code or situation.stuck


@pytest.mark.parametrize(
    ("changes", "requeue", "code"),
    [
        ({}, True, 75),
        ({"terminated": True}, False, 75),
        ({"terminated": True, "time_is_over": True}, True, 75),
        ({"terminated": True, "time_is_over": True, "state": "COMPLETING"}, True, 75),
        ({"stuck": True}, False, 70),
        ({"allowed": False}, False, 75),
        ({"batch": False}, False, 75),
        ({"state": "COMPLETING"}, False, 75),
        ({"state": None}, True, 75),
        ({"mode": "evaluate"}, False, 75),
        ({"name": "RENDEZVOUS", "exit_code": 69}, True, 69),
        ({"name": "CRASH", "exit_code": 70}, False, 70),
        ({"name": "CRASH", "exit_code": 70, "node_lost": True}, True, 70),
        ({"name": "NONFINITE", "exit_code": 76}, False, 76),
        ({"name": "STORAGE", "exit_code": 74}, False, 74),
    ],
)
def test_what_happens_to_a_job(changes, requeue, code):
    decision = decide(Situation(**{"mode": "train", "exit_code": 75, "name": "STOPPED"} | changes))
    assert (decision.requeue, decision.exit_code) == (requeue, code)


@pytest.mark.parametrize(
    ("steps", "is_stuck"),
    [
        ([None, None, None], False),
        ([None, None, None, None], True),
        ([None, None, None, 5], False),
        ([5, 5, 5, 5], True),
        ([0, 5, 5, 5], False),
        ([0, 5, 5, 5, 5], True),
    ],
)
def test_three_starts_without_a_newer_checkpoint_are_enough(steps, is_stuck):
    assert stuck(steps) is is_stuck


FAILURE = {"code": "STOPPED", "what": "stopped on SIGUSR1, after step 9", "rank": 0}


@pytest.mark.parametrize(
    ("returncode", "failure", "told", "saves", "code", "name"),
    [
        (0, None, Told(), True, 0, ""),
        (75, FAILURE, Told(stop=True), True, 75, "STOPPED"),
        (137, FAILURE, Told(stop=True), True, 75, "STOPPED"),
        (75, None, Told(), True, 75, "STOPPED"),
        (138, None, Told(stop=True), True, 75, "STOPPED"),
        (138, None, Told(), True, 70, "CRASH"),
        (-signal.SIGUSR1, None, Told(stop=True), True, 75, "STOPPED"),
        (-signal.SIGKILL, None, Told(), True, 70, "CRASH"),
        (137, None, Told(stop=True), True, 70, "CRASH"),
        (1, None, Told(), True, 70, "CRASH"),
        (2, None, Told(), True, 2, ""),
        (76, None, Told(), True, 76, "NONFINITE"),
        (143, None, Told(stop=True), False, 143, ""),
        (143, FAILURE, Told(stop=True, interrupts=2), True, 130, ""),
    ],
)
def test_what_an_srun_ended_with(returncode, failure, told, saves, code, name):
    outcome = outcome_of(StepEnd(returncode, False), failure, told, saves=saves)
    assert (outcome.exit_code, outcome.name) == (code, name)


def test_signals_are_written_down_and_say_whether_all_ends_at_once():
    told = Told()
    assert not note(told, signal.SIGUSR1, saves=False), (
        "the time is not over yet, and there is nothing to save"
    )
    assert not told.stop
    assert not note(told, signal.SIGUSR1, saves=True)
    assert told.stop
    assert not told.terminated
    assert not note(told, signal.SIGTERM, saves=True)
    assert told.terminated
    assert note(told, signal.SIGTERM, saves=False)
    assert not note(told, signal.SIGINT, saves=True)
    assert note(told, signal.SIGINT, saves=True)


@pytest.mark.parametrize(
    ("script", "seconds"),
    [
        ("#!/bin/bash\n#SBATCH --signal=B:USR1@300\nexec x", 300),
        ("#!/bin/bash\n# a word\n\n#SBATCH --nodes=2 --signal B:USR1@90 # why\n", 90),
        ("#!/bin/bash\n#SBATCH --signal=USR1\n", 60),
        ("#!/bin/bash\n#SBATCH --signal=10@120\n", 120),
        ("#!/bin/bash\n#SBATCH --signal=RB:USR1@30\n#SBATCH --signal=B:USR1@40\n", 40),
        ("#!/bin/bash\n##SBATCH --signal=B:USR1@300\n", None),
        ("#!/bin/bash\necho\n#SBATCH --signal=B:USR1@300\n", None),
        ('#!/bin/bash\n#SBATCH --comment="\n', None),
        ("", None),
    ],
)
def test_the_lead_is_read_from_the_script_as_slurm_reads_it(script, seconds):
    assert parse_lead(script) == seconds


@given(st.text())
def test_any_text_is_read_without_an_error(text):
    parse_lead(text)
    parse_lead(f"#SBATCH {text}")
    parse_job(text)
    given_lead(text)


def test_what_slurm_says_of_a_job_is_read():
    line = "JobId=2 JobName=Requeue=0 JobState=RUNNING Reason=None Requeue=1 BatchFlag=1 EndTime={} X=1"
    facts = parse_job(line.format("2026-11-21T10:42:20"))
    assert (facts.state, facts.requeue, facts.batch) == ("RUNNING", True, True)
    assert facts.ends > 1.7e9
    assert parse_job(line.format("Unknown")).ends is None
    assert not facts.time_is_over
    assert parse_job("JobState=COMPLETING Reason=TimeLimit Requeue=1").time_is_over
    assert parse_job("slurm_load_jobs error: Invalid job id specified") is None


def test_a_lead_that_is_too_short_is_told_with_the_number_to_write():
    end = 1.8e9
    assert warning(Lead(300, end), 100.0) == ""
    assert "--signal=B:USR1@310 " in warning(Lead(300, end), 140.0)
    assert "--signal says 300 s before" in warning(Lead(300, end), 140.0)
    assert "nothing in the script" in warning(Lead(None, end), 1.0)
    assert warning(Lead(60, end), None) == ""
    assert warning(Lead(60, None), 1000.0) == "", "no limit, no end"
    assert (needed(0), needed(0.1), needed(35)) == (30, 40, 100)


@given(st.floats(0, 1e4))
def test_the_number_to_write_is_enough(seconds):
    assert warning(Lead(needed(seconds), 1.8e9), seconds) == ""
    assert needed(seconds) <= 2 * seconds + 40


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ('{"save": 1.5, "stop": 2.5}', 2.5),
        ('{"save": 1.5}', 1.5),
        ("{}", None),
        ("[1]", None),
        ('{"save": NaN}', None),
        ('{"save": "x"}', None),
        ("[" * sys.getrecursionlimit() * 10, None),
    ],
)
def test_times_of_saves_are_read_and_nonsense_is_not(text, seconds, tmp_path):
    (tmp_path / "save_times.json").write_text(text)
    assert save_seconds(tmp_path) == seconds
    assert save_seconds(tmp_path / "nowhere") is None
