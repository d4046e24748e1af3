"""The limit of open files: raised where it may be, refused in plain words where it is too low."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SHOWS = "import resource; from launch.open_files import allow_open_files; allow_open_files(); "
SHOWS += "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def limited(words, soft, hard):
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(HARD < 512, reason="this machine allows few open files itself")
@pytest.mark.parametrize(("soft", "hard"), [(64, 512), (512, 512), (128, 128)])
def test_a_low_limit_is_raised_as_far_as_it_may_be(soft, hard):
    done = limited(["-c", SHOWS], soft, hard)
    assert done.stdout.split() == [str(hard), str(hard)], done.stderr


def test_a_limit_that_is_too_low_to_train_is_refused_before_anything_is_read(tmp_path):
    done = limited(["training/run.py", "--run-dir", tmp_path / "run"], 64, 64)
    assert done.returncode == 2
    what, fatal = done.stderr.splitlines()
    assert what == "error: this process may open 64 files and connections, and needs 128 (ulimit -n)"
    assert fatal.startswith("FATAL code=USAGE rank=0 ")
    assert not (tmp_path / "run").exists()
