"""What a person sees must never cost the run."""

from __future__ import annotations

import contextlib
from pathlib import Path

from training.console import Console


def test_a_full_disk_behind_standard_output_is_told_once_and_ends_nothing(capsys):
    console = Console(active=True, every_seconds=0)
    opened = Path("/dev/full").open
    with contextlib.suppress(OSError), opened("w") as full, contextlib.redirect_stdout(full):
        console.say("one")
        console.say("two")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("No space left on device") == 1
    console.say("three")
    assert "three" in capsys.readouterr().out
