"""Signals and kills, to a launcher and to its processes, while they train: `pytest -s` shows the tables."""

from __future__ import annotations

from signal import SIGUSR1

import pytest

from data_pipeline.digits import ensure_digits
from tests.strikes import BIN, RUN, Case, Launcher, Outcome, check, go_on, undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# torchrun, also inside of accelerate, gives 1 for whatever its processes end with, and dies of SIGUSR1.
OWN = {Case("launcher", SIGUSR1): Outcome("STOPPED", -SIGUSR1)}
ACCELERATE = ["accelerate", "launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
LAUNCHERS = {
    launcher.name: launcher
    for launcher in (
        Launcher("torchrun", [BIN / "torchrun", "--nproc_per_node=2", RUN], 1, 1, OWN),
        Launcher("accelerate", [BIN / ACCELERATE[0], *ACCELERATE[1:], RUN], 1, 1, OWN),
        Launcher(
            "lockstep",
            [BIN / "lockstep", "launch", "--cpu", "--processes-per-node", 2, "--", "train"],
            75,
            70,
            {},
        ),
    )
}


@pytest.fixture(scope="module")
def digits(shared):
    ensure_digits(shared / "digits")
    return shared / "digits"


@pytest.fixture(scope="module")
def whole(once, digits):
    """A run that nothing disturbs."""
    return (
        once("struck-by-nothing", lambda folder: undisturbed(LAUNCHERS["torchrun"], digits, folder)) / "run"
    )


@pytest.mark.parametrize("name", LAUNCHERS)
def test_whoever_is_struck_the_job_ends_as_promised_leaves_nobody_and_goes_on(name, digits, whole, tmp_path):
    jobs = check(LAUNCHERS[name], digits, tmp_path)
    go_on(LAUNCHERS[name], jobs, digits, whole)
