"""The commands that start a job: their texts, that a shell reads them back, and what they start."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.command import (
    LAUNCHERS,
    Command,
    accelerate_command,
    process_commands,
    srun_command,
    torchrun_command,
)
from launch.topology import Topology
from tests.marked_processes import MARK, living
from training.config import UserError

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent / "commands.txt"
HOSTILE = ["a b", "it's", '"', "$(touch x)", "`touch x`", "; touch x", "line\nbreak", "", "*", "~", "\\", "-"]


def topology_of(nodes, *, cpu=True):
    address = "n1" if nodes > 1 else "127.0.0.1"
    return Topology((2,) * nodes, nodes - 1, address, 29400, cpu=cpu, cores=3)


def commands_of(topology, words):
    program = "training/run.py"
    return [
        *process_commands(topology, program, words),
        *(make(topology, program, words) for make in LAUNCHERS.values()),
    ]


def test_the_commands_for_one_two_and_four_nodes_are_these():
    blocks = []
    for nodes in (1, 2, 4):
        commands = commands_of(topology_of(nodes, cpu=nodes < 4), ["train", "--seed", "1"])
        blocks.append("\n".join(command.text().replace(sys.executable, "python") for command in commands))
    assert "\n\n".join(blocks) + "\n" == GOLDEN.read_text()


def test_srun_asks_for_what_the_nodes_have():
    uneven = Topology((2, 1), cpu=True, cores=4)
    assert "--ntasks-per-node" not in srun_command(uneven, "run.py", []).argv
    assert (
        srun_command(uneven, "run.py", [])
        .text()
        .startswith("PYTHONUNBUFFERED=1 ACCELERATE_USE_CPU=true srun --nodes 2 --ntasks 3 --cpus-per-task 4 ")
    )
    crowded = srun_command(Topology((2, 2), cores=0, gpus=2), "run.py", [])
    assert "--overcommit --gres gpu:2 " in crowded.text()
    assert "--cpus-per-task" not in crowded.argv


def test_accelerate_is_not_asked_for_nodes_with_different_numbers_of_processes():
    with pytest.raises(UserError, match=r"not 2 \+ 1$") as caught:
        accelerate_command(Topology((2, 1)), "run.py", [])
    assert caught.value.code == "USAGE"


def test_one_process_under_accelerate_needs_no_several():
    argv = accelerate_command(Topology((1,), cpu=True), "run.py", []).argv
    assert "--multi_gpu" not in argv
    assert "--cpu" in argv


@pytest.fixture(scope="session")
def show(tmp_path_factory):
    """A program that writes its arguments and one of its variables, as JSON."""
    path = tmp_path_factory.mktemp("show") / "show it"
    path.write_text(
        f"#!{sys.executable} -S\n"
        "import json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ.get('VALUE')]))\n"
    )
    path.chmod(0o755)
    return str(path)


TEXTS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=12)


@settings(max_examples=40, deadline=None)
@given(words=st.lists(TEXTS | st.sampled_from(HOSTILE), max_size=6), value=TEXTS | st.sampled_from(HOSTILE))
def test_a_shell_reads_back_the_words_that_were_written(show, words, value):
    text = Command((show, *words), {"VALUE": value}).text()
    done = subprocess.run(["bash", "-c", text], capture_output=True, check=True)
    assert json.loads(done.stdout) == [words, value]


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_no_words_of_a_run_reach_the_shell_as_anything_but_words(nodes):
    for command in commands_of(topology_of(nodes), HOSTILE):
        subprocess.run(["bash", "-n", "-c", command.text()], check=True)
        assert shlex.split(command.text())[-len(HOSTILE) :] == HOSTILE
        assert command.argv[-len(HOSTILE) :] == tuple(HOSTILE)


def started_by_itself(topology, words):
    return process_commands(topology, str(ROOT / "training/run.py"), words)


def started_by_accelerate(topology, words):
    return [accelerate_command(topology, str(ROOT / "training/run.py"), words)]


def started_by_torchrun(topology, words):
    return [torchrun_command(topology, str(ROOT / "training/run.py"), words)]


@pytest.mark.slow
@pytest.mark.parametrize("commands", [started_by_itself, started_by_accelerate, started_by_torchrun])
def test_each_command_starts_two_processes_that_train_together(commands, digits, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        topology = replace(topology_of(1), port=free.getsockname()[1])
    words = ["--data.root", str(digits), "--run-dir", "the run", "--train.max-steps", "2", "--quiet"]
    words += ["--expect-processes", "2", "--train.exact", "true"]
    known = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    mark = tmp_path.name
    env = known | {"CUDA_VISIBLE_DEVICES": "", MARK: mark, "PYTHONPATH": str(ROOT)}
    with ExitStack() as stack:
        processes = []
        for number, command in enumerate(commands(topology, words)):
            said = stack.enter_context((tmp_path / f"{number}.txt").open("wb"))
            processes.append(
                subprocess.Popen(
                    command.argv, cwd=tmp_path, env=env | command.variables, stdout=said, stderr=said
                )
            )
        codes = [process.wait(timeout=120) for process in processes]
    told = "".join(path.read_text() for path in sorted(tmp_path.glob("*.txt")))
    assert set(codes) == {0}, told
    assert living(mark) == []
    assert "OMP_NUM_THREADS/MKL_NUM_THREADS unset" not in told
    start = json.loads((tmp_path / "the run/metrics.jsonl").read_text().splitlines()[0])
    assert (start["kind"], start["processes"]) == ("start", 2)
    state = json.loads(next((tmp_path / "the run/checkpoints").glob("*/state.json")).read_text())
    assert '"threads": 1' in json.dumps(state)
