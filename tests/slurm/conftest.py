"""A real SLURM of two nodes, which the tests of a process share."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from data_pipeline.digits import ensure_digits
from tests.slurm.claims import claim
from tests.slurm.cluster import Cluster, has_namespaces, missing
from tests.slurm.training_jobs import ROOT, Submitter, flags

# Set where SLURM was installed for these tests: what keeps it from coming up is a failure then.
REQUIRED = "LOCKSTEP_SLURM_REQUIRED"


@pytest.fixture(scope="session")
def cluster():
    """A cluster with nothing to do; nothing of it outlives the tests."""
    if reason := missing():
        pytest.skip(reason)
    claimed = claim()
    if claimed is None:
        pytest.skip("too many clusters on this machine")
    number, holder = claimed
    cluster = Cluster(number, isolated=has_namespaces())
    try:
        try:
            cluster.up()
        except (RuntimeError, OSError) as error:
            if REQUIRED in os.environ:
                raise
            pytest.skip(f"no SLURM here: {error}")
        yield cluster
    finally:
        cluster.down()
        holder.close()


@pytest.fixture(scope="session")
def common(shared):
    """The arguments of all runs, which are compared with one another."""
    ensure_digits(shared / "digits")
    return tuple(flags(shared / "digits"))


@pytest.fixture(scope="session")
def whole(once, common):
    """The directory of a run of one process that nothing disturbs, without SLURM."""

    def make(folder):
        command = [sys.executable, ROOT / "training" / "run.py", "--run-dir", "run", *common]
        env = {"PATH": os.defpath, "HOME": str(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, cwd=folder, env=env, capture_output=True, check=True, timeout=240)

    return once("slurm-whole", make) / "run"


@pytest.fixture
def submit(cluster, common, tmp_path):
    """`submit(nodes=2, tasks=1)`: training as a job, from a folder of its own; it ends with the test."""
    yield Submitter(cluster, tmp_path, common)
    cluster.rest()
