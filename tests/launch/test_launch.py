"""`lockstep launch`: what it takes, what it refuses, and what it shows without starting anything."""

from __future__ import annotations

import os
import re
import shlex
import sys

import pytest

from data_pipeline.fault import UserError
from launch.options import Options, parse

CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": os.path.dirname(sys.executable)}  # noqa: PTH120
BY_HAND = ["--nodes", "2", "--address", "h1"]


def test_words_behind_the_double_dash_are_those_of_the_program():
    options, words = parse(["--cpu", "--processes-per-node", "2", "--", "train", "--", "--cpu"])
    assert options == Options(cpu=True, processes_per_node=2)
    assert words == ["train", "--", "--cpu"]
    assert parse([]) == (Options(), [])


def test_whether_the_machines_were_named_is_remembered():
    assert parse(["--nodes", "1"])[0].by_hand
    assert parse(["--with", "torchrun"])[0].by_hand
    assert not parse(["--max-restarts", "2"])[0].by_hand


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*BY_HAND, "--node-rank", "2"], ["--node-rank 2", "--nodes 2"]),
        ([*BY_HAND, "--min-nodes", "3"], ["--min-nodes 3", "--nodes 2"]),
        (["--nodes", "2"], ["--nodes 2", "--address"]),
        ([*BY_HAND, "--with", "torchrun", "--max-restarts", "1"], ["--max-restarts 1", "--with torchrun"]),
        (["--follow"], ["--follow", "--slurm"]),
        (["--gpus", "8"], ["--gpus 8", "--slurm"]),
        (["--sbatch=--constraint=a100"], ["--sbatch --constraint=a100", "--slurm"]),
        (["--slurm", "--with", "accelerate"], ["--with accelerate", "--slurm"]),
        (["--slurm", "--cpu", "--gpus", "2"], ["--cpu", "--gpus 2"]),
        (["--processes-per-node", "0"], ["'0'", "--processes-per-node"]),
        (["--wait", "nan"], ["--wait", "'nan'"]),
        ([*BY_HAND[:3], "a b;c"], ["--address", "a b;c"]),
    ],
)
def test_options_that_contradict_one_another_are_refused_with_both_values(argv, said):
    with pytest.raises(UserError) as refusal:
        parse(argv)
    assert refusal.value.code == "USAGE"
    assert all(word in refusal.value.what for word in said), refusal.value.what


@pytest.mark.parametrize("argv", [["--train.max-steps", "5"], ["--fresh"], ["train"]])
def test_arguments_of_the_program_without_the_double_dash_are_told_where_they_belong(argv):
    with pytest.raises(UserError, match=re.escape(argv[0])) as refusal:
        parse(argv)
    assert "double dash" in refusal.value.mend
    assert "lockstep launch" in refusal.value.mend


def test_a_mistake_in_the_programs_arguments_is_found_before_anything_is_started(refused, tmp_path):
    code, what, _ = refused("launch", "--cpu", "--", "--run-dir", tmp_path / "run", "--train.max-step", "5")
    assert (code, (tmp_path / "run").exists()) == ("USAGE", False)
    assert "did you mean --train.max-steps?" in what


def test_a_dry_run_shows_a_command_for_each_process_that_a_shell_understands(lockstep, tmp_path):
    words = ["--run-dir", tmp_path / "a 'run'", "--fresh"]
    done = lockstep("launch", "--cpu", "--processes-per-node", "2", "--dry-run", "--", *words, env=CPU)
    assert (done.returncode, done.stderr) == (0, "")
    where, *commands = done.stdout.splitlines()
    assert where == "2 processes on CPUs"
    assert [re.match(r"RANK=(\d) WORLD_SIZE=2 ", one)[1] for one in commands] == ["0", "1"]
    assert all(str(tmp_path / "a 'run'") in shlex.split(one) for one in commands)
    assert all(one.endswith("--fresh --expect-processes 2") for one in commands)
    assert not (tmp_path / "a 'run'").exists()


@pytest.mark.parametrize("agent", ["torchrun", "accelerate"])
def test_a_dry_run_shows_the_command_of_another_launcher(lockstep, agent):
    options = ["--cpu", "--processes-per-node", "2", "--with", agent]
    done = lockstep("launch", *options, "--dry-run", "--", "--seed", "3", env=CPU)
    _, command = done.stdout.splitlines()
    assert "PET_SIGNALS_TO_HANDLE" in command
    assert command.endswith("training/run.py --seed 3 --expect-processes 2")


def test_no_secret_of_the_environment_is_shown(lockstep):
    secrets = {"WANDB_API_KEY": "hush-hush", "LOCKSTEP_TOKEN": "hush-hush"}
    done = lockstep("launch", "--cpu", "--dry-run", "--", "--seed", "1", env={**CPU, **secrets})
    assert done.returncode == 0
    assert "hush" not in done.stdout + done.stderr


def test_more_processes_than_gpus_are_refused(lockstep):
    done = lockstep("launch", "--processes-per-node", "2", env=CPU)
    assert done.returncode == 2
    assert "--processes-per-node 2: this machine has 0 GPUs" in done.stderr
    assert "--cpu" in done.stderr.splitlines()[-1]


def test_another_number_of_processes_than_the_arguments_expect_is_refused(lockstep):
    done = lockstep("launch", "--cpu", "--", "--expect-processes", "3", env=CPU)
    assert done.returncode == 2
    assert "--expect-processes 3: 1 would be started" in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["--", "--help"], ["--", "--print-config"]])
def test_text_that_was_asked_for_is_given_and_nothing_is_started(lockstep, words):
    done = lockstep("launch", *words, env=CPU)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) > 20
