"""Starts of fewer processes than were asked for: refused, with a line to use instead that works."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.real_jobs import BIN, RUN, begin, clear_away, records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

ACCELERATE = [BIN / "accelerate", "launch", "--num_processes=2", "--main_process_port=0"]
THREE = ["--expect-processes", 3]


@pytest.fixture
def run(digits, tmp_path):
    """`run(command, ...)`: the exit code and what was said."""

    def call(command, *more, env=None):
        job = begin(command, tmp_path, digits=digits, more=more, env=env)
        try:
            return job.process.wait(timeout=100), job.text()
        finally:
            clear_away(job)

    return call


def refused(code, text, what):
    assert code != 0, text
    assert text.count(f"error: {what}") == 1, text
    assert text.count("FATAL code=USAGE ") == 1, text
    (hint,) = re.findall(r'^FATAL .* hint="(.*)"$', text, re.MULTILINE)
    return hint


def test_accelerate_that_would_start_one_process_of_two_is_refused_and_the_line_to_use_instead_works(
    run, tmp_path
):
    hint = refused(*run([*ACCELERATE, "--cpu", RUN], "--train.max-steps", 2), "accelerate was asked for")
    assert not (tmp_path / "run").exists()
    assert hint.startswith("lockstep launch --cpu --processes-per-node 2 -- ")
    code, text = run(shlex.split(hint), "--train.max-steps", 2)
    assert code == 0, text
    assert records(tmp_path / "run", "start")[0]["processes"] == 2
    assert len(records(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("command", "started"),
    [
        ([BIN / "python", RUN], 1),
        ([BIN / "torchrun", "--nproc_per_node=2", RUN], 2),
        ([*ACCELERATE, "--multi_gpu", RUN], 2),
        ([BIN / "lockstep", "launch", "--cpu", "--processes-per-node", 2, "--", "train"], 2),
    ],
    ids=["python", "torchrun", "accelerate", "lockstep"],
)
def test_fewer_processes_than_expected_are_refused_under_every_launcher(run, tmp_path, command, started):
    refused(*run(command, *THREE), f"--expect-processes 3: {started} ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seconds", [6, 60], ids=["late", "stuck"])
def test_a_mistake_is_said_once_also_where_the_first_process_is_the_last_to_find_it(run, tmp_path, seconds):
    """The launcher ends all with the first that leaves, before the one that speaks has spoken."""
    script = tmp_path / "one"
    script.write_text(f'[ "$RANK" != 0 ] || sleep {seconds}\nexec "$@"\n')
    command = [BIN / "torchrun", "--nproc_per_node=3", "--no-python", "bash", script, BIN / "python", RUN]
    code, text = run(command, "--expect-processes", 4)
    assert code == 1, text  # torchrun's own
    assert "STOPPED" not in text
    assert set(re.findall("FATAL code=USAGE rank=([0-9])", text)) <= ({"0"} if seconds < 15 else {"1", "2"})
    assert 1 <= text.count("error: --expect-processes 4: 3 ") <= (1 if seconds < 15 else 2), text
