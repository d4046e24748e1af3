"""Weights & Biases for real: offline into the run directory, and online where nothing answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RUN = Path(__file__).parent.parent.parent / "training" / "run.py"


@pytest.fixture
def train(execute, digits):
    def call(*flags, **env):
        basis = ["--data.root", digits, "--model.name", "test_resnet", "--run-dir", "run", "--quiet", "false"]
        done = execute([sys.executable, RUN, *basis, *flags], env=env)
        assert done.returncode == 0, done.stderr
        return done

    return call


def wandb_runs(tmp_path):
    """The identities of the runs in the run directory; every one has its file of records."""
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    for folder in folders:
        (file,) = folder.glob("*.wandb")
        assert file.stat().st_size > 1000
    return [folder.name.rpartition("-")[2] for folder in folders]


def evaluations(tmp_path):
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "eval"]


def test_a_run_that_is_resumed_goes_on_under_its_own_identity(train, tmp_path):
    for steps in (2, 4):
        done = train("--tracking.wandb", "offline", "--train.max-steps", steps)
        assert "Traceback" not in done.stderr
    first, second = wandb_runs(tmp_path)
    assert first == second
    assert len(evaluations(tmp_path)) == 2
    outside = [path.name for path in tmp_path.iterdir() if path.name not in ("run", "home")]
    assert outside == [], "wandb writes into the run directory only"


@pytest.mark.parametrize("key", [None, "0123456789" * 4])
def test_online_without_a_network_or_a_key_goes_on_offline_and_says_so_once(train, tmp_path, key):
    """Port 9 of this machine is closed: whoever connects is refused at once."""
    env = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "5"} | (
        {"WANDB_API_KEY": key} if key else {}
    )
    done = train("--tracking.wandb", "online", "--train.max-steps", 2, **env)
    assert done.stdout.count("tracking offline into") == 1
    assert len(wandb_runs(tmp_path)) == 1
    assert len(evaluations(tmp_path)) == 1
