"""The cluster that these tests use: hosts that fail, and what is left of it when its owner is killed."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys

import pytest

from tests.marked_processes import wait_until
from tests.slurm.claims import FREEZER, NETWORK, OWNER, claim, folder_of, prefix, with_variable
from tests.slurm.training_jobs import ROOT

# A cluster of its own, with a job that would go on for ever.
OWNED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from tests.slurm.claims import claim
from tests.slurm.cluster import Cluster, has_namespaces

number, holder = claim()
cluster = Cluster(number, isolated=has_namespaces())
cluster.up()
job = cluster.submit("--nodes=2", "--output=/dev/null", "--wrap=srun sleep 1000", cwd="/")
cluster.wait_for(lambda: len(cluster.processes(job)) > 3, job)
print(number, flush=True)
time.sleep(1000)
"""


def answers(node):
    """Whether the node's slurmd can be reached."""
    try:
        socket.create_connection((node.address, node.port), timeout=0.5).close()
    except OSError:
        return False
    return True


def test_every_node_is_a_host_of_its_own(cluster):
    if not cluster.isolated:
        pytest.skip("namespaces are not allowed here")
    script = "hostname; hostname --ip-address; ps ax | wc -l"
    said = cluster.call("srun", "--nodes=2", "--label", "bash", "-c", script).splitlines()
    for number, node in enumerate(cluster.nodes.values()):
        name, address, processes = [line[3:] for line in said if line.startswith(f"{number}: ")]
        assert (name, address) == (node.name, node.address)
        assert int(processes) < 20, "it sees processes of others"


def test_a_cable_can_be_pulled_and_plugged_in_again(cluster):
    if not cluster.isolated:
        pytest.skip("namespaces are not allowed here")
    node = list(cluster.nodes.values())[1]
    assert answers(node)
    cluster.cut(node.name)
    try:
        assert not answers(node)
    finally:
        cluster.heal(node.name)
    assert wait_until(lambda: answers(node), within=20)


def test_what_a_killed_owner_leaves_the_next_one_removes(cluster):
    command = [sys.executable, "-c", OWNED, str(ROOT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        number = int(owner.stdout.readline())
        owner.send_signal(signal.SIGKILL)
    assert number != cluster.number
    left = with_variable(f"{OWNER}={folder_of(number)}")
    assert len(left) > 6
    handles = [os.pidfd_open(one) for one in left]
    _, holder = claim()
    try:
        ended, _, _ = select.select(handles, [], [], 0)
        assert len(ended) == len(handles)
        assert not folder_of(number).exists()
        assert not [*NETWORK.glob(prefix(number)), *NETWORK.glob(f"{prefix(number)}n*")]
        assert not list(FREEZER.glob(f"slurm_{prefix(number)}n*"))
    finally:
        holder.close()
        for handle in handles:
            os.close(handle)
    assert cluster.call("sinfo", "--noheader").split(), "the other one is left alone"
