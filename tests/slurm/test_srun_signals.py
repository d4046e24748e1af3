"""Signals and kills where a person types `srun python training/run.py`: `pytest -s` shows the table."""

from __future__ import annotations

import sys
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM

import pytest

from tests.real_jobs import RUN, begin, clear_away, failure, undisturbed
from tests.strikes import CASES, FINISHED, MORE_CASES, Case, Launcher, Outcome, check, go_on

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# srun has its own ideas of what is sent to it: at these its processes are killed at once, and of a single
# Ctrl-C they do not hear. SIGUSR1 it passes on.
OWN = {
    Case("launcher", SIGKILL): Outcome("", -SIGKILL),
    Case("launcher", SIGTERM): Outcome("", 128 + SIGKILL),
    Case("launcher", SIGHUP): Outcome("", 128 + SIGKILL),
    Case("launcher", SIGINT): FINISHED,
}
SRUN = ["srun", "--nodes", 1, "--ntasks", 2, sys.executable, RUN]


def test_whoever_is_struck_the_job_ends_as_promised_leaves_nobody_and_goes_on(
    cluster, once, digits, tmp_path
):
    env = cluster.environment()
    srun = Launcher("srun", SRUN, 75, 128 + SIGKILL, OWN, [*CASES, *MORE_CASES], env)
    whole = once("srun-whole", lambda folder: undisturbed(SRUN, folder, digits=digits, env=env)) / "run"
    jobs = check(srun, digits, tmp_path)
    go_on(srun, jobs, digits, whole)


def test_fewer_tasks_than_expected_are_refused(cluster, digits, tmp_path):
    more = ["--expect-processes", 3]
    job = begin(SRUN, tmp_path, digits=digits, more=more, env=cluster.environment())
    try:
        assert job.process.wait(timeout=60) == 2, job.text()
    finally:
        clear_away(job)
    assert job.text().count("error: --expect-processes 3: 2 came up") == 1, job.text()
    assert not failure(job.run_dir)
