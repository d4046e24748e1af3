"""Signals and kills, to a launcher and to its processes, while they train: `pytest -s` shows the tables."""

from __future__ import annotations

from signal import SIGUSR1

import pytest

from tests.real_jobs import BIN, RUN, undisturbed
from tests.strikes import CASES, MORE_CASES, Case, Launcher, Outcome, check, go_on

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# torchrun, also inside of accelerate, gives 1 for whatever its processes end with, and dies of SIGUSR1.
OWN = {Case("launcher", SIGUSR1): Outcome("STOPPED", -SIGUSR1)}
TORCHRUN = [BIN / "torchrun", "--nproc_per_node=2", RUN]
ACCELERATE = [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0", RUN]
OURS = [BIN / "lockstep", "launch", "--cpu", "--processes-per-node", 2, "--", "train"]
LAUNCHERS = {
    "torchrun": Launcher("torchrun", TORCHRUN, 1, 1, OWN),
    "accelerate": Launcher("accelerate", ACCELERATE, 1, 1, OWN),
    "lockstep": Launcher("lockstep", OURS, 75, 70, cases=[*CASES, *MORE_CASES]),
}


@pytest.fixture(scope="module")
def whole(once, digits):
    """A run of two processes that nothing disturbs."""
    return once("struck-by-nothing", lambda folder: undisturbed(OURS, folder, digits=digits)) / "run"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_whoever_is_struck_the_job_ends_as_promised_leaves_nobody_and_goes_on(name, digits, whole, tmp_path):
    jobs = check(LAUNCHERS[name], digits, tmp_path)
    go_on(LAUNCHERS[name], jobs, digits, whole)
