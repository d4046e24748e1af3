"""The embedded digits, and the means to run a program of ours in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.digits import ensure_digits

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """These networks are tiny, and the cores are busy with other tests."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The embedded data set, packed once for all pytest-xdist processes of this test run."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "training-digits"
    ensure_digits(root)
    return root


@pytest.fixture
def execute(tmp_path):
    """`execute(command)`: run it in `tmp_path`, on the CPU, knowing nothing of this machine's set-up."""

    def call(command, *, env=None, timeout=150):
        known = {key: os.environ[key] for key in ("PATH", "TMPDIR", "LANG") if key in os.environ}
        clean = {"HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            [str(word) for word in command],
            cwd=tmp_path,
            env={**known, **clean, "PYTHONPATH": str(ROOT), **(env or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    return call


@pytest.fixture
def script(execute):
    """`script(code)`: run Python code as a program."""

    def call(code, *arguments, env=None):
        return execute([sys.executable, "-c", code, *arguments], env=env)

    return call
