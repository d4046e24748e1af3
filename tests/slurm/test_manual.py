"""Everything that slurm/README.md tells to type, typed as it stands there, on a real SLURM."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import skimage.data
import yaml
from PIL import Image

from training.vigil.ending import EXIT_CODES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parent.parent.parent
MANUAL = (ROOT / "slurm" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", MANUAL, re.DOTALL)
# A part of each block, by what it is about.
SET_UP, FIRST, LOOK, WITHOUT_SCRIPT = "make setup", "sbatch --nodes=2", "squeue --me", "--dry-run"
STOP, EVALUATE, PACK, ARRAY = "scancel", "evaluate.sbatch", "--merge", "{task}"
USED = (SET_UP, FIRST, LOOK, WITHOUT_SCRIPT, STOP, EVALUATE, PACK, ARRAY)
JOB = re.compile(r"^(?:Submitted batch job|job) (\d+)", re.MULTILINE)


def block(holding):
    (found,) = [text for text in BLOCKS if holding in text]
    return found


class Shell:
    """A shell on a login node, in a folder like a fresh clone whose .venv is made already."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder

    def type(self, text, *, code=0, **variables):
        """What is said on stdout and stderr together."""
        env = self.cluster.environment(**variables)
        words = ["bash", "-euc", text]
        done = subprocess.run(
            words, cwd=self.folder, env=env, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def done(self, said):
        """The jobs that were submitted, when all have come to a good end."""
        jobs = JOB.findall(said)
        assert jobs, said
        for job in jobs:
            info = self.cluster.wait(job)
            found = (info["JobState"], info["ExitCode"])
            assert found == ("COMPLETED", "0:0"), self.cluster.log(job)[-5000:]
        return jobs


@pytest.fixture(scope="module")
def shell(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    for name in (
        "launch",
        "training",
        "data_pipeline",
        "slurm",
        "Makefile",
        "pyproject.toml",
        "constraints.txt",
    ):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    for name in ("coffee", "chelsea"):
        (folder / "pictures" / name).mkdir(parents=True)
        photo = getattr(skimage.data, name)()
        for number in range(12):
            picture = Image.fromarray(photo[10 * number : 10 * number + 90, :90])
            picture.save(folder / "pictures" / name / f"{number}.jpg")
    return Shell(cluster, folder)


@pytest.fixture(scope="module")
def first(shell):
    """The job of the first block, when it is done."""
    (job,) = shell.done(shell.type(block(FIRST)))
    return job


def starts(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [one for one in lines if one["kind"] == "start"]


def test_every_block_of_the_manual_is_typed_here():
    assert sorted(map(block, USED)) == sorted(BLOCKS)


def test_the_set_up_is_a_target_of_make_and_an_environment(shell):
    make, activate = (line.split("#")[0] for line in block(SET_UP).splitlines())
    shell.type(f"{make} --dry-run; {activate}; command -v lockstep")


def test_the_first_job_trains_on_two_nodes(first, shell):
    assert [one["processes"] for one in starts(shell.folder / "runs/first")] == [2]
    assert (shell.folder / f"train-{first}.out").exists()


def test_a_job_is_looked_at_until_its_end(first, shell):
    said = shell.type(block(LOOK), job=first)
    assert f"job {first}: COMPLETED" in said
    assert "runs/first/weights/best.safetensors" in said


def test_without_a_script_a_job_is_shown_submitted_and_followed(shell):
    said = shell.type(block(WITHOUT_SCRIPT))
    (job,) = set(JOB.findall(said))
    assert f"job {job}: COMPLETED" in said
    assert re.search(r"^  run +runs/second$", said, re.MULTILINE)
    assert [one["processes"] for one in starts(shell.folder / "runs/second")] == [1]
    shell.type("sbatch --test-only second.sbatch")


def test_a_run_goes_on_in_another_job_of_another_size(first, shell):
    waiting = shell.type("sbatch --parsable --hold slurm/train.sbatch").strip()
    said = shell.type(block(STOP), job=waiting)
    assert shell.cluster.info(waiting)["JobState"] == "CANCELLED"
    shell.done(said)


def test_a_run_is_evaluated_and_predicts(first, shell):
    evaluated, _ = shell.done(shell.type(block(EVALUATE)))
    assert re.search(r"^accuracy +[01]\.[0-9]+", shell.cluster.log(evaluated), re.MULTILINE)
    with (shell.folder / "runs/first/predictions.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 24


def test_parts_that_are_packed_by_an_array_are_the_data_set_of_one_machine(shell):
    said = shell.type(block(PACK))
    (merge,) = JOB.findall(said)
    shell.done(f"job {merge}")
    shell.type("lockstep pack pictures alone")
    names = sorted(path.name for path in (shell.folder / "alone").iterdir())
    assert names == sorted(path.name for path in (shell.folder / "data/photos").iterdir())
    for name in names:
        alone, parts = ((shell.folder / place / name).read_bytes() for place in ("alone", "data/photos"))
        assert alone == parts, name


def test_the_tasks_of_an_array_have_seeds_and_runs_of_their_own(shell):
    (array,) = JOB.findall(shell.type(block(ARRAY)))
    for task in (1, 2):
        assert shell.cluster.wait(f"{array}_{task}")["JobState"] == "COMPLETED"
        run_dir = shell.folder / f"runs/digits-{array}_{task}"
        assert yaml.safe_load((run_dir / "config.yaml").read_text())["seed"] == task
        assert (run_dir / "weights/best.safetensors").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("cd pictures && sbatch --export=NONE ../slurm/train.sbatch", "nor in .venv"),
        ("sbatch --export=NONE slurm/train.sbatch --sed 3", "did you mean --seed?"),
        ("sbatch slurm/evaluate.sbatch", "of which run?"),
        ("sbatch --array=0-1 slurm/pack_array.sbatch pictures data/x", "--array=1-2"),
        ("sbatch slurm/train.sbatch --sed 3", "did you mean --seed?"),
    ],
)
def test_a_job_that_was_submitted_wrongly_says_so_at_once(command, said, shell):
    (job,) = JOB.findall(shell.type(command))
    job = f"{job}_0" if "--array" in command else job
    info = shell.cluster.wait(job)
    assert (info["JobState"], info["ExitCode"]) == ("FAILED", "2:0")
    assert said in shell.cluster.log(job)
    assert "Traceback" not in shell.cluster.log(job)


def test_what_slurm_would_not_start_is_refused_in_two_lines_and_nothing_is_queued(shell):
    for options in ("--partition nowhere", "--nodes 3", "--time 1:00:00 --sbatch=--no-such-option"):
        said = shell.type(f"lockstep launch --slurm {options} --", code=2)
        assert re.fullmatch(r"error: SLURM .+\nFATAL code=USAGE .+\n", said), said
    assert shell.type("squeue --me --noheader") == ""


def test_slurm_takes_every_script_and_every_quote_in_it(shell):
    for name in ("train", "evaluate", "predict", "pack_array"):
        shell.type(f"sbatch --test-only slurm/{name}.sbatch")
    rendered = "lockstep launch --slurm --nodes 2 --gpus 4 --cpus 2 --min-nodes 1 --array 0-5%2 --time 1-00"
    raw = r"""--sbatch="--comment='it is #1 \\ 50%'" --sbatch='--mem 100M' --job-name a.b-c_d"""
    shell.type(f"{rendered} {raw} --dry-run -- --run-dir 'a {{task}}' > quotes.sbatch")
    shell.type("sbatch --test-only quotes.sbatch")
    job = shell.type("sbatch --parsable --hold --array=0 quotes.sbatch").strip()
    said = shell.type(f"scontrol show job {job}_0; scancel {job}")
    assert re.search(r"^ *Comment=it is #1 \\ 50% *$", said, re.MULTILINE), said
    assert re.search(r"JobName=a\.b-c_d$", said, re.MULTILINE)
    assert re.search(rf"StdOut=.*/a\.b-c_d-{job}_0\.out$", said, re.MULTILINE), said


def test_the_exit_codes_in_the_manual_are_those_that_there_are():
    listed = re.search(r"^Exit codes: (.*?)\.\n", MANUAL, re.DOTALL | re.MULTILINE)
    assert set(map(int, re.findall(r"\b\d+\b", listed[1]))) == {0, 2, *EXIT_CODES.values()}
