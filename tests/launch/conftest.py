"""What several tests of launching compare with."""

from __future__ import annotations

import pytest

from tests.real_jobs import BIN, EXACT, RUN, undisturbed


@pytest.fixture(scope="module")
def alone(once, digits):
    """A run of one process that nothing disturbs; exact, so its bits are those of any number of processes."""
    one = [BIN / "python", RUN]
    return once("alone", lambda folder: undisturbed(one, folder, digits=digits, more=EXACT)) / "run"
