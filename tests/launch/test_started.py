"""What a process refuses about how it was started: fewer processes than were meant, or a place among them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.started import check_launch
from launch.topology import PROCESS_VARIABLES
from training.config import UserError

RUN = Path(__file__).parent.parent.parent / "training" / "run.py"
STARTS = json.loads((Path(__file__).parent / "slurm_environments.json").read_text())["starts"]
ONE_OF_FOUR = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
ONE_OF_FOUR |= {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}
LAUNCH_PREFIXES = ("SLURM", "ACCELERATE_", "TORCHELASTIC_", "LOCKSTEP_", "OMP_", "CUDA_")


@pytest.fixture
def environment(monkeypatch):
    """`environment(**values)`: what this process was started with, as far as launchers set it."""

    def put(**values):
        for name in list(os.environ):
            if name in PROCESS_VARIABLES or name.startswith(LAUNCH_PREFIXES):
                monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def refusal(*arguments):
    with pytest.raises(UserError) as caught:
        check_launch(*arguments)
    assert caught.value.code == "USAGE"
    assert "\n" not in caught.value.what
    return caught.value


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, "--num_processes"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a"}, "RANK=2"),
        ({"RANK": "1"}, "RANK=1"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"WORLD_SIZE": "٣"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='9"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK='x'"),
        ({"WORLD_SIZE": "2", "RANK": "$(touch x)"}, "RANK='$(touch x)'"),
        ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
        (ONE_OF_FOUR | {"RANK": "4"}, "RANK=4 of WORLD_SIZE=4"),
        (ONE_OF_FOUR | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2 of 2"),
        (ONE_OF_FOUR | {"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5"),
        (ONE_OF_FOUR | {"MASTER_PORT": "x"}, "MASTER_PORT='x'"),
        (ONE_OF_FOUR | {"MASTER_PORT": "65536"}, "MASTER_PORT='65536'"),
        (ONE_OF_FOUR | {"MASTER_ADDR": ""}, "without MASTER_ADDR"),
        (ONE_OF_FOUR | {"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS='many'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "without MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "without RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_a_start_that_cannot_be_meant_is_refused(environment, values, word):
    environment(**values)
    assert word in refusal().what


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"ACCELERATE_MIXED_PRECISION": "no"},
        {"MASTER_ADDR": "127.0.0.1"},
        {"RANK": "0"},
        {"OMP_NUM_THREADS": "4,2"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "29500"},
        {key: value for key, value in ONE_OF_FOUR.items() if key != "LOCAL_WORLD_SIZE"},
        ONE_OF_FOUR | {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"},
    ],
)
def test_a_start_by_any_launcher_passes(environment, values):
    environment(**values)
    check_launch()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changed=st.dictionaries(
        st.sampled_from(sorted(ONE_OF_FOUR)),
        st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=6)
        | st.integers(-2, 9).map(str),
    )
)
def test_whatever_the_variables_hold_a_start_passes_or_is_refused(environment, changed):
    environment(**ONE_OF_FOUR | changed)
    try:
        check_launch()
    except UserError:
        return
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    assert 0 <= int(os.environ["RANK"]) < world
    assert 0 <= int(os.environ["LOCAL_RANK"]) < local <= world


def test_another_number_of_processes_than_expected_is_refused_with_the_line_to_use(environment):
    environment(**ONE_OF_FOUR)
    check_launch(4)
    error = refusal(8, ["--seed", "3", "--run-dir", "a b"])
    assert error.what == "--expect-processes 8: 4 came up"
    # On a machine without GPUs, as where this test is run, the line says so.
    words = error.mend.replace(" --cpu ", " ")
    assert words == "lockstep launch --processes-per-node 8 -- --seed 3 --run-dir 'a b'"
    environment()
    check_launch(1)
    assert refusal(2).what == "--expect-processes 2: 1 came up"


SEVERAL = ["ntasks_per_node", "ntasks_uneven", "nodes", "cpus_per_task", "salloc", "gpus_per_node"]


@pytest.mark.parametrize("name", SEVERAL)
def test_one_process_in_a_job_of_several_tasks_is_refused_with_the_line_to_use(environment, name):
    environment(**STARTS[name]["job"])
    error = refusal(None, ["--run-dir", "a b"])
    assert "SLURM_N" in error.what
    assert error.mend.startswith("srun python training/run.py --run-dir 'a b'; ")
    assert error.mend.endswith("--expect-processes 1")
    check_launch(1)


@pytest.mark.parametrize("name", ["plain", "gpus"])
def test_one_process_in_a_job_of_one_task_passes(environment, name):
    environment(**STARTS[name]["job"])
    check_launch()


def test_a_shell_of_salloc_starts_one_process_as_a_batch_script_does(environment):
    environment(**STARTS["salloc_interactive"]["tasks"][0])
    assert "SLURM_NTASKS=4" in refusal().what


def test_a_single_task_of_srun_in_a_larger_job_passes(environment):
    environment(**STARTS["ntasks_per_node"]["job"] | STARTS["srun_one"]["tasks"][0])
    check_launch()


def start(*command, **env):
    """Run a command to its end, knowing nothing of this machine's set-up."""
    known = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    words = [str(word) for word in command]
    env = {**known, "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.slow
def test_accelerate_that_starts_one_process_instead_of_two_is_refused_with_the_line_to_use():
    words = ["train", "--run-dir", "it's here", "--seed", "3"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    done = start(*launcher, RUN, *words, MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    (fatal,) = [line for line in done.stderr.splitlines() if line.startswith("FATAL")]
    assert fatal.startswith("FATAL code=USAGE rank=0 hint=")
    hint = json.loads(fatal.partition("hint=")[2])
    assert shlex.split(hint) == [
        *("lockstep", "launch", "--cpu", "--processes-per-node", "2", "--"),
        *words,
    ]


@pytest.mark.parametrize(
    ("variables", "rank", "speaks"),
    [
        (ONE_OF_FOUR | {"RANK": "abc"}, 0, False),
        (ONE_OF_FOUR | {"RANK": "abc", "LOCAL_RANK": "0"}, 0, True),
        (ONE_OF_FOUR | {"RANK": "7"}, 7, True),
        (ONE_OF_FOUR | {"LOCAL_RANK": "abc"}, 3, True),
        (ONE_OF_FOUR | {"MASTER_PORT": "x"}, 3, False),
        (ONE_OF_FOUR | {"MASTER_PORT": "x", "LOCAL_RANK": "0", "RANK": "2"}, 2, True),
    ],
)
def test_a_wrong_place_is_told_once_without_a_traceback(variables, rank, speaks, tmp_path):
    done = start(sys.executable, RUN, "--run-dir", tmp_path / "run", **variables)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count(f"FATAL code=USAGE rank={rank} ") == speaks
    assert bool(done.stderr) == speaks
    assert not (tmp_path / "run").exists()


def test_a_process_of_srun_knows_its_number_when_it_refuses(tmp_path):
    task = STARTS["ntasks_per_node"]["tasks"][2]
    done = start(sys.executable, RUN, "--expect-processes", "9", "--run-dir", tmp_path / "run", **task)
    assert done.returncode == 2
    assert "FATAL code=USAGE rank=2 " in done.stderr
    silent = start(sys.executable, RUN, "--expect-processes", "9", **STARTS["ntasks_per_node"]["tasks"][3])
    assert (silent.returncode, silent.stderr) == (2, "")
    wrong = start(
        sys.executable, RUN, **STARTS["ntasks_per_node"]["tasks"][3] | {"SLURM_NODEID": "$(touch x)"}
    )
    assert (wrong.returncode, wrong.stderr) == (2, "")


def test_less_than_one_process_cannot_be_expected():
    done = start(sys.executable, RUN, "--expect-processes", "0")
    assert done.returncode == 2
    assert "FATAL code=CONFIG" in done.stderr
