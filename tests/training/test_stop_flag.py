"""Who may stop a process: signals and the clock; and what a second interrupt does."""

from __future__ import annotations

import signal

import pytest

from training.stop_flag import stops_at_once

INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1

SIGNALS = """
import os, signal, sys, time
from training.stop_flag import STOP_SIGNALS, StopFlag

signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
for number in STOP_SIGNALS:
    flag = StopFlag()
    assert not flag.asked and flag.reason == ""
    for _ in range(1 if number == signal.SIGINT else 5):
        os.kill(os.getpid(), number)
    if number == signal.SIGHUP:
        assert not flag.asked
    else:
        assert flag.signal == number and flag.reason == flag.agreed_reason() == f"on {number.name}"
signal.signal(signal.SIGHUP, signal.SIG_DFL)
flag = StopFlag()
os.kill(os.getpid(), signal.SIGHUP)
os.kill(os.getpid(), signal.SIGTERM)
assert flag.reason == "on SIGHUP"

flag = StopFlag(0.5, since=time.monotonic() - 29)
assert not flag.asked
flag = StopFlag(0.5, since=time.monotonic() - 31)
assert flag.asked and flag.reason == "after 0.5 minutes as asked"

flag = StopFlag()
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGINT)
assert flag.reason == "on SIGTERM"
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted", flush=True)
while True:
    time.sleep(0.1)  # whoever does not leave by itself is made to
"""


def test_signals_and_the_clock_ask_to_stop_and_a_second_interrupt_leaves_at_once(script):
    done = script(SIGNALS)
    assert (done.returncode, done.stdout, done.stderr) == (130, "interrupted\n", "")


@pytest.mark.parametrize("under_torchrun", [True, False])
def test_torchrun_makes_a_termination_of_the_second_interrupt(under_torchrun, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert not any(map(stops_at_once, ([], [INT], [TERM] * 5 + [USR1] * 5, [TERM, INT], [INT, USR1])))
    assert all(map(stops_at_once, ([INT, INT], [TERM, INT, INT], [INT, USR1, INT])))
    assert stops_at_once([INT, TERM]) is under_torchrun
