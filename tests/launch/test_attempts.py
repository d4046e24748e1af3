"""What a launcher knows of the starts of a run, and whether another one would help."""

from __future__ import annotations

import json
import os
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.attempts import (
    IN_VAIN,
    LAUNCHES,
    RESTARTABLE,
    Outcome,
    failure_of,
    newest_step,
    record_start,
    stamp_of,
    steps_before,
    stuck,
    words_again,
)
from training.vigil.ending import EXIT_CODES, Failure

CAUSE = Failure("CRASH", 1, "h2", "ValueError: boom", "start again", 7)


def commit(run_dir, step):
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").write_text("{}")


def test_the_newest_step_is_that_of_a_committed_checkpoint(tmp_path):
    assert newest_step(tmp_path) is None
    commit(tmp_path, 5)
    commit(tmp_path, 123456789)
    for name in (".step-00000020.part", "step-00000030", "aside-step-00000040", "step-x"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert newest_step(tmp_path) == 123456789


def test_a_failure_counts_only_for_the_start_that_wrote_it(tmp_path):
    assert failure_of(tmp_path, None) is None
    CAUSE.write(tmp_path, first=False)
    before = stamp_of(tmp_path)
    assert failure_of(tmp_path, before) is None
    (tmp_path / "failure.json").unlink()
    assert failure_of(tmp_path, before) is None
    CAUSE.write(tmp_path, first=True)
    assert failure_of(tmp_path, before)["what"] == "ValueError: boom"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[]",
        "[" * 100_000,
        '{"code": "CRASH"}',
        json.dumps({"code": "BOOM", "rank": 0, "host": "h", "what": "w", "hint": "h", "step": None}),
        json.dumps({"code": "CRASH", "rank": True, "host": "h", "what": "w", "hint": "h", "step": None}),
        json.dumps({"code": "CRASH", "rank": 0, "host": "h", "what": 3, "hint": "h", "step": None}),
        json.dumps({"code": ["CRASH"], "rank": 0, "host": "h", "what": "w", "hint": "h", "step": 1}),
        json.dumps(
            {"code": "CRASH", "rank": 0, "host": "h", "what": "w" * (1 << 19), "hint": "h", "step": 1}
        ),
    ],
)
def test_what_is_no_failure_of_ours_is_none(tmp_path, text):
    (tmp_path / "failure.json").write_text(text)
    assert failure_of(tmp_path, None) is None


def test_starts_are_written_down_and_those_that_follow_by_themselves_count_together(tmp_path):
    run_dir = tmp_path / "runs" / "new"
    assert record_start(run_dir, again=False, processes=2, nodes=1) == [None]
    commit(run_dir, 8)
    assert record_start(run_dir, again=True, processes=1, nodes=1, job="17") == [None, 8]
    assert steps_before(run_dir) == [None, 8, 8]
    commit(run_dir, 16)
    assert record_start(run_dir, again=False, processes=2, nodes=1) == [16]
    lines = [json.loads(line) for line in (run_dir / LAUNCHES).read_text().splitlines()]
    assert [(one["start"], one["step"], one["processes"], one["job"]) for one in lines] == [
        (0, None, 2, None),
        (1, 8, 1, "17"),
        (0, 16, 2, None),
    ]


def test_lines_that_are_not_ours_are_passed_over(tmp_path):
    (tmp_path / LAUNCHES).write_bytes(b'\xff\n3\n{"start": -1}\n{"start": 0, "step": "x"}\n{"start": 0, "st')
    assert steps_before(tmp_path) == [None]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_left_to_the_run(tmp_path):
    tmp_path.chmod(0o500)
    assert record_start(tmp_path / "run", again=False, processes=1, nodes=1) == [None]


def test_a_run_directory_that_is_a_file_is_left_to_the_run(tmp_path):
    (tmp_path / "run").touch()
    assert record_start(tmp_path / "run", again=False, processes=1, nodes=1) == [None]


@given(st.lists(st.none() | st.integers(0, 5), max_size=8))
def test_a_run_is_stuck_exactly_after_three_starts_that_brought_no_newer_checkpoint(steps):
    numbers = [-1 if step is None else step for step in steps]
    grew = [after > before for before, after in pairwise(numbers)]
    assert stuck(steps) == (len(grew) >= IN_VAIN and not any(grew[-IN_VAIN:]))


def test_what_may_be_mended_by_another_start():
    assert sorted(RESTARTABLE) == [69, 70, 71]
    assert not any(Outcome(code, name).restartable for name, code in EXIT_CODES.items() if code > 71)
    assert not any(Outcome(code).restartable for code in (0, 2, 130))
    assert Outcome(3, "CRASH").restartable


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["train", "--fresh", "--seed", "1"], ["train", "--seed", "1"]),
        (["--fresh", "true", "--seed=1"], ["--seed=1"]),
        (["--fresh=yes"], []),
        (["--no-fresh", "--quiet"], ["--quiet"]),
        (["--seed", "1", "--fresh"], ["--seed", "1"]),
    ],
)
def test_another_start_does_not_begin_anew(words, left):
    assert words_again(words) == left
