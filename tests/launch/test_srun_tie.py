"""Processes whose srun is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.srun_tie import address_in_hex, connections_to, srun_of

ROOT = Path(__file__).parent.parent.parent
SRUN = {"SLURM_STEP_ID": "0", "SLURM_SRUN_COMM_HOST": "10.84.0.254", "SLURM_SRUN_COMM_PORT": "34943"}
LINES = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100540A:E8D2 FE00540A:9123 01 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 0100540A:E8D3 FE00540A:9124 08 00000000:00000000 00:00000000 00000000     0        0 1 1
   2: 0100540A:E8D4 FD00540A:9123 01 00000000:00000000 00:00000000 00000000     0        0 1 1
   3: 0100540A:E8D5
"""


@pytest.mark.skipif(sys.byteorder != "little", reason="the lines are from such a machine")
def test_a_connection_with_sruns_host_is_one_that_both_ends_hold():
    assert connections_to("10.84.0.254", LINES) == {"0100540A:E8D2 FE00540A:9123"}
    assert connections_to("10.84.0.2", LINES) == frozenset()
    assert address_in_hex("::1") == "0" * 24 + "01000000"
    assert address_in_hex("node7") == address_in_hex("") == address_in_hex("1\0") == ""


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_ID": ""},
        {"SLURM_SRUN_COMM_HOST": "$(touch x)"},
        {"SLURM_SRUN_COMM_PORT": "70000"},
        {"SLURM_SRUN_COMM_PORT": "x"},
        {"TORCHELASTIC_RUN_ID": "none"},
        {"LOCKSTEP_START": "0"},
    ],
)
def test_only_what_a_plain_srun_has_started_is_tied_to_it(change):
    assert srun_of(SRUN) == ("10.84.0.254", 34943)
    assert srun_of(SRUN | change) is None


# Listens as srun does, takes the connection that stands for the step daemon's, and says its ports.
LISTENS = """
import socket, time
messages, output = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
print(messages.getsockname()[1], output.getsockname()[1], flush=True)
held = output.accept()
time.sleep(60)
"""
TIED = """
import signal, time
from launch.srun_tie import tie_to_srun
signal.signal(signal.SIGTERM, lambda *_: print("told", flush=True))
tie_to_srun()
print("tied", flush=True)
while True:
    time.sleep(0.1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.slow
def test_a_process_is_told_to_stop_when_its_srun_is_gone_and_leaves_after_a_grace():
    srun = subprocess.Popen([sys.executable, "-c", LISTENS], stdout=subprocess.PIPE, text=True)
    port, output = map(int, srun.stdout.readline().split())
    with socket.create_connection(("127.0.0.1", output)):
        own = SRUN | {"SLURM_SRUN_COMM_HOST": "127.0.0.1", "SLURM_SRUN_COMM_PORT": str(port)}
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **own}
        task = subprocess.Popen([sys.executable, "-c", TIED], env=env, stdout=subprocess.PIPE, text=True)
        assert task.stdout.readline() == "tied\n"
        time.sleep(3)
        assert task.poll() is None
        srun.kill()
        gone = time.monotonic()
        assert task.stdout.readline() == "told\n"
        told = time.monotonic() - gone
        assert task.wait(20) == 128 + signal.SIGTERM
    assert told < 4, told
    srun.communicate()
    task.communicate()
