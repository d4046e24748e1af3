"""The scripts of jobs: their texts, what bash makes of them, and what cannot get into them."""

from __future__ import annotations

import os
import re
import shutil
import string
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.options import Options, parse
from launch.slurm.sbatch_values import is_name, name_after, raw_words, seconds_of
from launch.slurm.script import render, shipped
from training.config import UserError

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden" / "slurm"
SHIPPED = ("train", "evaluate", "predict")
# What `lockstep launch --slurm` is given, by the name of the file that holds the script.
RENDERED = {
    "one_node_cpu": "--nodes 1 -- --train.epochs 3",
    "two_nodes_cpu": "--nodes 2 --processes-per-node 2 --cpus 4 --time 2:00:00 -- train --run-dir runs/a",
    "four_nodes_gpu": "--nodes 4 --gpus 8 --cpus 6 --time 1-00 --partition gpu --account me -- --seed 1",
    "fewer_nodes": "--nodes 4 --min-nodes 2 --gpus 1 --max-restarts 2 --wait 60 --signal-seconds 600 --",
    "array": "--array 0-5%2 --job-name seeds -- --config photos --seed {task}",
    "raw": "--cpu --sbatch=--mem=64G --sbatch=--comment='it is #1' -- evaluate --run-dir runs/a",
}
HOSTILE = [
    "a b",
    "it's",
    '"',
    "$(touch x)",
    "`touch x`",
    "; touch x",
    "",
    "*",
    "~",
    "\\",
    "-",
    "%j",
    "#x",
    "é",
]


def rendered(command: str) -> str:
    options, words = parse(["--slurm", *command.split()] if "'" not in command else words_of(command))
    return render(options, words, name=options.job_name or "digits")


def words_of(command: str) -> list[str]:
    """Split at blanks outside of quotes, which stay: sbatch reads them."""
    return ["--slurm", *re.findall(r"(?:[^\s']|'[^']*')+", command)]


def texts() -> dict[str, str]:
    """Every script that is in the project or comes out of it."""
    ours = {path.name: path.read_text() for path in sorted((ROOT / "slurm").glob("*.sbatch"))}
    return ours | {name: rendered(command) for name, command in RENDERED.items()}


@pytest.mark.parametrize("name", RENDERED)
def test_a_rendered_script_is_the_golden_one(name):
    assert rendered(RENDERED[name]) == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("mode", SHIPPED)
def test_a_shipped_script_is_what_is_rendered_for_no_options(mode):
    assert (ROOT / "slurm" / f"{mode}.sbatch").read_text() == shipped(mode)


@pytest.mark.parametrize("name", sorted(texts()))
def test_bash_and_shellcheck_find_nothing_in_a_script(name, tmp_path):
    path = tmp_path / "job.sbatch"
    path.write_text(texts()[name])
    assert subprocess.run(["bash", "-n", path], capture_output=True, check=True).stderr == b""
    if shutil.which("shellcheck") is None:
        pytest.skip("not installed: shellcheck")
    done = subprocess.run(["shellcheck", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """`told(text, *own, task=None)`: the arguments that `lockstep` is started with by the script `text`."""
    folder = tmp_path_factory.mktemp("told")
    program = folder / "lockstep"
    program.write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done > "$TOLD"\n')
    program.chmod(0o755)

    def run(text, *own, task=None):
        script, said = folder / "job.sbatch", folder / "said"
        script.write_bytes(text.encode("utf-8", "surrogateescape"))
        path = f"{folder}{os.pathsep}{os.defpath}"
        env = {"PATH": path, "TOLD": str(said), "SLURM_SUBMIT_DIR": str(folder), "LC_ALL": "C.UTF-8"}
        env |= {"SLURM_ARRAY_TASK_ID": task} if task else {}
        subprocess.run(["bash", script, *map(os.fsencode, own)], env=env, check=True)
        assert sorted(path.name for path in folder.iterdir()) == ["job.sbatch", "lockstep", "said"]
        words = said.read_bytes().split(b"\0")[:-1]
        return [word.decode("utf-8", "surrogateescape") for word in words]

    return run


# What stands in one line and can be typed: also bytes that are no UTF-8.
LETTERS = st.one_of(
    st.sampled_from(string.printable.strip() + " "),
    st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")),
    st.integers(0xDC80, 0xDCFF).map(chr),
)
WORDS = st.lists(st.text(LETTERS, max_size=20).filter(lambda word: not bad_utf8_pair(word)), max_size=6)


def bad_utf8_pair(word: str) -> bool:
    """Whether stray bytes meet by chance and are a letter: no argument comes to us like that."""
    return os.fsdecode(word.encode("utf-8", "surrogateescape")) != word


@settings(max_examples=60, deadline=None)
@given(words=WORDS)
def test_words_survive_bash_whatever_they_are(words, told):
    given_words = ["--x", *words]
    expected = ["launch", "--", "train", *given_words]
    assert told(render(Options(slurm=True), given_words)) == expected
    if "{task}" not in "".join(words):
        assert told(shipped("train"), *given_words) == expected
        assert told(shipped("train"), *given_words, task="7") == expected


def test_hostile_words_are_words_and_nothing_more(told):
    words = ["--run-dir", *HOSTILE]
    assert told(render(Options(slurm=True), words))[3:] == words
    assert told(shipped("evaluate"), *words)[2:] == ["evaluate", *words]


def test_in_an_array_each_task_finds_its_number_where_the_arguments_say_task(told):
    words = ["--seed", "{task}", "--run-dir", "runs/it's {task} of {task}", "--x", "{tasks}"]
    expected = ["--seed", "7", "--run-dir", "runs/it's 7 of 7", "--x", "{tasks}"]
    assert told(render(Options(slurm=True, array="1-9"), words), task="7")[3:] == expected
    assert told(shipped("train"), *words, task="7")[3:] == expected
    assert told(render(Options(slurm=True), words))[3:] == words
    assert told(shipped("train"), *words)[3:] == words


@pytest.mark.parametrize("name", ["train.sbatch", "pack_array.sbatch", "one_node_cpu"])
def test_where_lockstep_is_not_on_path_a_script_says_what_to_do(name, tmp_path):
    path = tmp_path / "job.sbatch"
    path.write_text(texts()[name])
    env = {"PATH": os.defpath, "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", path], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"lockstep is neither on this job's PATH nor in \.venv: .*activate.*\n", done.stderr)


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["--job-name", "a;touch x"], "a;touch x"),
        (["--job-name", "$(touch x)"], "--job-name"),
        (["--job-name", "a\n#SBATCH --uid=0"], r"a\n#SBATCH"),
        (["--job-name", "../../etc/x"], "--job-name"),
        (["--job-name", "%u"], "--job-name"),
        (["--job-name", "x" * 5000], "64 at most"),
        (["--job-name", ""], "--job-name"),
        (["--partition", "a b"], "--partition"),
        (["--partition", "gpu\nx"], "--partition"),
        (["--account=-x"], "--account"),
        (["--qos", "$HOME"], "--qos"),
        (["--array", "1;2"], "--array"),
        (["--array", "{task}"], "--array"),
        (["--time", "tomorrow"], "--time"),
        (["--time", "1:2:3:4"], "--time"),
        (["--time", "٣"], "--time"),
        (["--time", "5"], "--signal-seconds 300 --time 5"),
        (["--time", "0"], "--time 0"),
        (["--signal-seconds", "86400", "--time", "3-0"], "65535"),
        (["--sbatch=--comment=a\n#SBATCH --uid=0"], "one line"),
        (["--sbatch=--comment=a\r"], "one line"),
        (["--sbatch=--comment='a"], "no closing quotation"),
        (["--sbatch=constraint"], "an option of sbatch"),
        (["--gpus", "4", "--processes-per-node", "2"], "--processes-per-node 2 --gpus 4"),
    ],
)
def test_what_cannot_stand_in_a_script_is_refused_and_named(command, named):
    options, _ = parse(["--slurm", *command])
    with pytest.raises(UserError) as error:
        render(options, [])
    assert error.value.code == "USAGE"
    assert named in error.value.what
    assert len(error.value.what) < 200


def test_what_saves_nothing_may_have_less_time_than_saving_takes():
    assert "#SBATCH --time=5\n" in render(Options(slurm=True, time="5"), ["evaluate", "--run-dir", "a"])


@pytest.mark.parametrize("letter", ["\n", "\r", "\0", "\x1b", "\x85", "\u2028"])
def test_control_characters_in_an_argument_are_refused(letter):
    with pytest.raises(UserError, match="control characters"):
        render(Options(slurm=True), ["--run-dir", f"a{letter}b"])


def test_all_mistakes_are_named_at_once():
    with pytest.raises(UserError) as error:
        render(Options(slurm=True, job_name="/", qos=" ", time="x", sbatch=("y",)), [])
    assert len(error.value.what.splitlines()) == 4


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("5:30", 330), ("1:00:00", 3600), ("2-3", 183600), ("1-2:30", 95400), ("1-0:0:5", 86405)],
)
def test_a_time_is_read_as_sbatch_reads_it(text, seconds):
    assert seconds_of(text) == seconds


@given(st.text())
def test_a_job_named_after_a_file_has_a_name_that_is_allowed(config):
    assert is_name(name_after(config))


def test_a_raw_option_keeps_its_quotes_and_backslashes_for_sbatch():
    assert raw_words("--constraint='a100|h100'") == "'--constraint=a100|h100'"
    assert raw_words(r"--comment='a\b'") == r"'--comment=a\\b'"
    assert raw_words("--mem 64G") == "--mem 64G"
