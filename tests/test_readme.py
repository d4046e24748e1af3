"""Everything that the README tells a newcomer to type, typed as it stands there."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import yaml
from PIL import Image

from data_pipeline.index import read_dataset
from training.config import Config
from training.config.tree import fields_of
from training.flags import Flags

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README, re.DOTALL)


def block(language: str, holding: str) -> str:
    (found,) = [text for kind, text in BLOCKS if kind == language and holding in text]
    return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder like a fresh clone, whose .venv is the environment that runs this test."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("launch", "training", "data_pipeline", "Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def typed(command, folder):
    """The command as a shell runs it, with this environment's programs found first; its output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # What a make that runs these tests was told is none of what a newcomer types.
    own = {
        name: value for name, value in os.environ.items() if name not in ("ARGS", "MAKEFLAGS", "MAKELEVEL")
    }
    environment = {**own, "PATH": path, "OMP_NUM_THREADS": "1"}
    words = ["bash", "-euc", command]
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(clone):
    """What `make demo` prints; `-o setup`: this environment is set up already."""
    return typed("make -o setup demo", clone)


@pytest.mark.slow
def test_make_demo_reaches_its_accuracy_on_two_processes_and_says_where_everything_is(demo, clone):
    accuracy = float(re.search(r"^accuracy +([0-9.]+)", demo, re.MULTILINE)[1])
    assert accuracy >= 0.97
    records = [json.loads(line) for line in (clone / "runs/digits/metrics.jsonl").read_text().splitlines()]
    assert records[0]["kind"] == "start"
    assert records[0]["processes"] == 2
    for name in ("run", "plots", "weights"):
        path = re.search(rf"^{name} +(runs/\S+)$", demo, re.MULTILINE)[1]
        assert (clone / path).exists()


@pytest.mark.slow
def test_the_weights_load_as_the_readme_says(demo, clone):
    program = block("python", "load_state_dict")
    subprocess.run([sys.executable, "-c", program], cwd=clone, check=True, timeout=120)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_users_own_pictures_go_from_a_folder_to_an_evaluation(clone):
    draws = np.random.default_rng(0)
    for name in ("coffee", "chelsea"):
        folder = clone / "pictures" / name
        folder.mkdir(parents=True)
        photo = getattr(skimage.data, name)()
        for number in range(20):
            top, left = draws.integers(0, 100, 2)
            Image.fromarray(photo[top : top + 180, left : left + 180]).save(folder / f"{number}.jpg")
    output = typed(block("sh", "lockstep pack pictures"), clone)
    assert (clone / "data/photos/samples.png").exists()
    assert (clone / "runs/photos/weights/best.safetensors").exists()
    assert re.search(r"^accuracy +[01]\.[0-9]+$", output, re.MULTILINE)
    with (clone / "runs/photos/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40
    assert {row["prediction"] for row in rows} <= {"coffee", "chelsea"}
    shown = typed(block("sh", "lockstep launch --slurm"), clone)
    assert "#SBATCH --gpus-per-node=8" in shown
    starts = (clone / "runs/photos/launches.jsonl").read_text().splitlines()
    assert [json.loads(line)["processes"] for line in starts] == [1, 2]


def test_the_flags_that_change_a_recipe_do_so(clone):
    configurations = typed(block("sh", "--model.name smp/Unet"), clone).split("\ntask: ")
    first, second = (yaml.safe_load(f"task: {text.removeprefix('task: ')}") for text in configurations)
    assert (first["loss"]["bce"]["weight"], first["loss"]["dice"]["weight"]) == (0.5, 0.5)
    assert first["model"]["arguments"] == {"encoder_name": "resnet18"}
    assert second["model"]["pretrained"] == "weights.pth"
    assert second["optim"]["schedule"]["step"]["step_size"] == "2ep"


@pytest.mark.slow
def test_tables_masks_and_tars_become_data_sets_as_the_readme_says(clone):
    photo = skimage.data.coffee()
    for folder in ("scans", "cells/images", "cells/masks", "shards"):
        (clone / folder).mkdir(parents=True)
    rows = ["image,patient,effusion,nodule"]
    for number in range(12):
        crop = Image.fromarray(photo[10 * number : 10 * number + 90, :90])
        crop.save(clone / f"scans/{number}.png")
        rows.append(f"{number}.png,{number // 2},{number % 2},{'' if number == 3 else number % 3 // 2}")
        crop.save(clone / f"cells/images/{number}.png")
        crop.convert("1").save(clone / f"cells/masks/{number}_mask.png")
    (clone / "findings.csv").write_text("\n".join(rows))
    for shard in range(3):
        with tarfile.open(clone / f"shards/{shard:04d}.tar", "w") as tar:
            for number in range(4 * shard, 4 * shard + 4):
                tar.add(clone / f"scans/{number}.png", f"{number:06d}.png")
                label = tarfile.TarInfo(f"{number:06d}.cls")
                label.size = 1
                tar.addfile(label, io.BytesIO(str(number % 2).encode()))
    typed(block("sh", "lockstep index"), clone)
    tasks = {"findings": "multilabel", "cells": "segmentation", "foreign": "multiclass"}
    for name, task in tasks.items():
        dataset = read_dataset(clone / "data" / name)
        assert dataset.task == task
        assert dataset.split("train").samples + dataset.split("val").samples == 12


def test_the_first_block_names_targets_that_make_knows(clone):
    for line in block("sh", "make demo").splitlines():
        subprocess.run([*line.split("#")[0].split(), "--dry-run"], cwd=clone, check=True, capture_output=True)


def test_every_option_that_the_readme_names_exists():
    packing = {"--part", "--merge", "--resize-shorter", "--reencode"}
    for option in packing:
        assert option in typed("lockstep pack --help", ROOT)
    launching = {"--max-restarts", "--wait", "--min-nodes", "--nodes"}
    for option in launching:
        assert option in typed("lockstep launch --help", ROOT)
    others = {"--section.field", "--help"} | packing | launching
    for option in sorted(set(re.findall(r"`(--[a-z][^` ]*)", README)) - others):
        name = option.removeprefix("--").replace("-", "_")
        assert name in dict(fields_of(Flags)) | dict(fields_of(Config)), option


def test_every_file_that_the_readme_links_to_exists():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
