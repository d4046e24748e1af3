"""Golden losses: the first steps of a seeded run, kept in a file, so that a change of them is seen.

After a change that is meant to move them, write the file anew and commit it with the reason:

    LOCKSTEP_REWRITE_GOLDEN=1 pytest tests/golden
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.digits import ensure_digits

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent / "digits_test_resnet.json"
STEPS = 20
TOLERANCE = 1e-4  # relative: other processors round other last bits, and they grow from step to step


def train(folder):
    """The records of the run: one process with one thread, on the CPU."""
    ensure_digits(folder / "digits")
    flags = {
        "--run-dir": folder / "run",
        "--data.root": folder / "digits",
        "--model.name": "test_resnet",
        "--train.max-steps": STEPS,
        "--debug.batch-digest": "keys",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "training" / "run.py"), *words]
    subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, timeout=200)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_first_steps_of_a_seeded_run_are_those_that_were_written_down(tmp_path):
    records = train(tmp_path)
    steps = [record for record in records if record["kind"] == "train"]
    (evaluation,) = [record for record in records if record["kind"] == "eval"]
    found = {
        "losses": [record["loss"] for record in steps],
        "rates": [record["lr"] for record in steps],
        "key_digests": [record["batch_digest"] for record in steps],
        "val_loss": evaluation["metrics"]["loss"],
        "val_keys": evaluation["certificate"]["digest"],
    }
    if os.environ.get("LOCKSTEP_REWRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
        pytest.skip(f"{GOLDEN.name} was written anew")
    golden = json.loads(GOLDEN.read_text())
    assert len(found["losses"]) == STEPS
    assert found["key_digests"] == golden["key_digests"], "other samples, or another order"
    assert found["val_keys"] == golden["val_keys"]
    assert found["rates"] == pytest.approx(golden["rates"], rel=1e-12)
    assert found["losses"] == pytest.approx(golden["losses"], rel=TOLERANCE)
    assert found["val_loss"] == pytest.approx(golden["val_loss"], rel=10 * TOLERANCE)
