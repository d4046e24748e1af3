"""One process among others: what it checks first, who may stop it, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from training.process import EXIT_CODES

LAUNCH_VARIABLES = (
    *("MASTER_ADDR", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"),
)


@pytest.fixture
def ends(script, tmp_path):
    """`ends(statement)`: a process that runs the statement inside `last_words`, with a run directory."""
    (tmp_path / "run").mkdir(exist_ok=True)

    def call(statement, **env):
        code = f"""
import errno, os, sys
from pathlib import Path
from training.config import UserError
from training.process import Agreed, Ended, last_words
with last_words() as place:
    place.run_dir = Path("run")
    {statement}
print("went on")
"""
        return script(code, env=env)

    return call


def failure(tmp_path):
    return json.loads((tmp_path / "run" / "failure.json").read_text())


ENDS = [
    ("raise UserError('this is bad', mend='do that', code='CONFIG')", 2, "CONFIG", "do that"),
    ("raise Ended('STOPPED', 'stopped on request', hint='start again')", 75, "STOPPED", "start again"),
    ("raise Ended('NONFINITE', 'the loss is nan', hint='lower the rate')", 76, "NONFINITE", "lower the rate"),
    ("raise Ended('STORAGE', 'no room', hint='make room')", 74, "STORAGE", "make room"),
    ("open('/nowhere/file')", 74, "STORAGE", ""),
    ("raise OSError(errno.ENOSPC, 'No space left on device', 'here')", 74, "STORAGE", ""),
    ("1 / 0", 70, "CRASH", "start the same command again"),
    ("raise ConnectionResetError(104, 'Connection reset by peer')", 70, "CRASH", ""),
    ("raise MemoryError", 70, "CRASH", ""),
]


@pytest.mark.parametrize("case", ENDS, ids=lambda case: case[0])
def test_whatever_ends_a_run_has_its_exit_code_its_last_line_and_its_failure_file(ends, tmp_path, case):
    statement, exit_code, name, hint = case
    done = ends(statement)
    assert done.returncode == exit_code
    assert "went on" not in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"FATAL code={name} rank=0 ")
    assert hint in last
    assert done.stderr.count("FATAL") == 1
    assert failure(tmp_path).items() >= {"code": name, "rank": 0}.items()
    ours = name == "CRASH" or "nowhere" in statement  # the program's doing, not the user's or the disk's
    assert done.stderr.count("Traceback") == int(ours)


def test_a_run_that_ends_well_says_nothing(ends, tmp_path):
    done = ends("pass")
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")
    assert not (tmp_path / "run" / "failure.json").exists()


def test_an_exit_code_that_was_asked_for_is_kept(ends):
    assert ends("sys.exit(3)").returncode == 3
    assert ends("raise KeyboardInterrupt").returncode == 130


def test_a_mistake_that_all_processes_make_is_told_by_the_first_of_each_machine(ends):
    statement = "raise UserError('this is bad', mend='do that')"
    told = ends(statement, RANK="2", LOCAL_RANK="0", WORLD_SIZE="4")
    silent = ends(statement, RANK="1", LOCAL_RANK="1", WORLD_SIZE="4")
    assert told.returncode == silent.returncode == 2
    assert "FATAL code=DATA rank=2" in told.stderr
    assert silent.stderr == ""


def test_a_mistake_of_one_process_among_others_is_told_whichever_it_is(ends):
    done = ends("place.joined(3); raise UserError('this is bad', mend='do that')", LOCAL_RANK="3")
    assert "FATAL code=DATA rank=3" in done.stderr


def test_only_the_first_process_to_fail_shows_its_traceback(ends, tmp_path):
    first = ends("place.joined(1); place.step = 7; 1 / 0")
    second = ends("place.joined(0); raise ConnectionResetError('the other one is gone')")
    assert first.returncode == second.returncode == 70
    assert first.stderr.count("Traceback") == 1
    assert "FATAL code=CRASH rank=1 " in first.stderr
    assert "step=8" in first.stderr.splitlines()[-1]
    assert second.stderr == "process 0 ends because another one failed\n"
    assert (failure(tmp_path)["rank"], failure(tmp_path)["step"]) == (
        1,
        8,
    )  # counted from 1, as in the records
    assert "ZeroDivisionError" in failure(tmp_path)["what"]


def test_what_process_zero_reports_ends_the_others_silently_with_the_same_code(ends):
    done = ends("place.joined(1); raise Agreed(74)")
    assert (done.returncode, done.stderr) == (74, "")


@pytest.mark.parametrize("run_dir", ["None", "Path('nowhere')", "Path('file')"])
def test_without_a_run_directory_the_last_line_is_still_said(ends, tmp_path, run_dir):
    (tmp_path / "file").write_text("")
    done = ends(f"place.run_dir = {run_dir}; 1 / 0")
    assert done.returncode == 70
    assert "FATAL code=CRASH" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "nowhere").exists()


def test_exit_codes_are_those_that_scripts_know():
    codes = {"CRASH": 70, "HANG": 71, "STORAGE": 74, "STOPPED": 75, "NONFINITE": 76}
    assert EXIT_CODES.items() >= codes.items()


STOPS = """
import os, signal
from training.stop_flag import StopFlag
flag = StopFlag()
assert not flag.asked
for name in ("{first}", "{first}", "SIGINT"):
    os.kill(os.getpid(), signal.Signals[name])
    assert flag.asked and flag.signal == signal.{first}, name
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("stopped at once")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_signals_set_the_flag_and_a_second_interrupt_stops_at_once(script, name):
    done = script(STOPS.format(first=name))
    assert (done.stdout, done.stderr) == ("stopped at once\n", "")


CHILD = """
import time
from launch.ties import tie_to_launcher
tie_to_launcher()
print("tied", flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize(("variable", "dies"), [("TORCHELASTIC_RUN_ID", True), ("SOMETHING_ELSE", False)])
def test_a_process_dies_with_its_launcher_but_not_with_a_shell(variable, dies):
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    command = [sys.executable, "-c", PARENT]
    parent = subprocess.Popen(command, env={**clean, variable: "x"}, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    time.sleep(0.5)
    assert alive(child) is not dies
    if not dies:
        os.kill(child, signal.SIGKILL)


def alive(number):
    try:
        with open(f"/proc/{number}/stat") as stat:  # noqa: PTH123 - a file of the kernel's
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
