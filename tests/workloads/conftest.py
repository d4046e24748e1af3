"""Raw files of the five workloads, as users have them, and the means to type a recipe's own commands.

Everything is drawn from real digits (scikit-learn) and real photographs (scikit-image) by fixed seeds: digits
on a canvas have labels and masks that are known exactly. Digits of one split never appear in another.
Shapes: H W pixels, N samples.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import skimage.data
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree
from sklearn.datasets import load_digits

from training.config import RECIPES

ROOT = Path(__file__).resolve().parent.parent.parent
FINDINGS = (
    *("atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia"),
    *("pneumothorax", "consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia"),
)
GLYPH_SIDE = 26  # pixels of a digit on a canvas
# Photographs that stand in for the views of ultrasound.
VIEWS = ("brick", "grass", "gravel", "moon", "coins")
HOW_MANY = (0.1, 0.55, 0.15, 0.12, 0.08)  # of the scans have 0, 1 … 4 digits
MARGIN = 2  # canvas pixels around the four places of digits


class Drawn(NamedTuple):
    """A canvas with digits on it."""

    pixels: np.ndarray  # uint8 [H, W]
    mask: np.ndarray  # bool [H, W], the digits' pixels
    digits: list[int]


# The means.


@pytest.fixture(scope="session")
def typed():
    """`typed(command, *flags, folder=…, processes=…)`: what a command of a recipe says, with flags behind it.

    What `accelerate launch` does on a machine with as many GPUs, python and torchrun do here on the CPU.
    """

    def call(command, *flags, folder, processes=1):
        words = shlex.split(command)
        if words[0] == "lockstep":
            words[:1] = [sys.executable, "-m", "launch"]
        else:
            assert words[:3] == ["accelerate", "launch", "training/run.py"]
            torchrun = [Path(sys.executable).parent / "torchrun", "--standalone"]
            several = [*torchrun, f"--nproc_per_node={processes}"]
            words[:3] = [*([sys.executable] if processes == 1 else several), ROOT / "training" / "run.py"]
        known = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "LANG") if key in os.environ}
        alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [str(word) for word in [*words, *flags]],
            cwd=folder,
            env={**known, **alone, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=330,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


@pytest.fixture(scope="session")
def commands():
    """`commands(recipe)`: pack, train, evaluate and predict as its header writes them, by these names."""

    def read(recipe):
        header = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8").split("\ntask:")[0]
        lines = [line.removeprefix("#").removeprefix(" Command").strip() for line in header.splitlines()]
        kinds = {"lockstep pack": "pack", "run.py --config": "train", "run.py evaluate": "evaluate"}
        kinds["run.py predict"] = "predict"
        whole = [line for line in lines if line.startswith(("lockstep ", "accelerate "))]
        found = {next(name for words, name in kinds.items() if words in line): line for line in whole}
        assert found.keys() == set(kinds.values()), header
        assert len(found) == len(whole), header
        return found

    return read


@pytest.fixture(scope="session")
def workload(once, typed, commands):
    """`workload(recipe, raw)`: a folder where all that the recipe's header says has been typed, once.

    Trained on two processes (train.txt is what it said); then evaluated and predicted on one in the folder
    one/, and on two in two/, both with that run. runs/alone is the beginning of the same training on one
    process. Flags go behind the commands of their name; the commands of `also` come after that to pack.
    """

    def get(recipe, raw, *, train=(), alone=(), evaluate=(), predict=(), also=()):
        said = commands(recipe)

        def use(place, processes):
            out = typed(said["evaluate"], *evaluate, folder=place, processes=processes)
            (place / "evaluate.txt").write_text(out)
            typed(said["predict"], *predict, folder=place, processes=processes)

        def make(folder):
            for given in raw.iterdir():
                (folder / given.name).symlink_to(given)
            for command in (said["pack"], *also):
                typed(command, folder=folder)
            flags = [*train, "--debug.batch-digest", "pixels"]
            (folder / "train.txt").write_text(typed(said["train"], *flags, folder=folder, processes=2))
            for name in ("one", "two"):
                (folder / name).mkdir()
                for given in (folder / "data", *raw.iterdir()):
                    (folder / name / given.name).symlink_to(given)
                shutil.copytree(folder / "runs", folder / name / "runs")
            # At the same time: most of it is the start of Python.
            with ThreadPoolExecutor() as threads:
                jobs = [threads.submit(use, folder / "one", 1), threads.submit(use, folder / "two", 2)]
                beginning = [*flags, "--train.max-steps", 2, "--run-dir", "runs/alone", *alone]
                jobs.append(threads.submit(typed, said["train"], *beginning, folder=folder))
                for job in jobs:
                    job.result()

        return once(recipe, make)

    return get


@pytest.fixture(scope="session")
def results():
    """`results(folder, recipe)`: what evaluate and predict wrote on two processes, by name."""

    def find(folder, recipe, name="two"):
        run = folder / name / "runs" / recipe
        predictions = [path for path in run.rglob("*") if "predictions" in path.relative_to(run).as_posix()]
        files = [folder / name / "evaluate.txt", run / "weights" / "best.evaluation.json", *predictions]
        return {path.relative_to(run.parent.parent).as_posix(): path for path in files if path.is_file()}

    return find


@pytest.fixture(scope="session")
def evaluation():
    """`evaluation(folder, recipe)`: what evaluate wrote in a workload's folder."""

    def read(folder, recipe):
        file = folder / "two" / "runs" / recipe / "weights" / "best.evaluation.json"
        return json.loads(file.read_text())

    return read


@pytest.fixture(scope="session")
def records():
    """`records(run_dir, kind)`: what metrics.jsonl holds of that kind."""

    def read(run_dir, kind):
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return [one for one in map(json.loads, lines) if one["kind"] == kind]

    return read


@pytest.fixture(scope="session")
def alike(records, evaluation, results):
    """`alike(folder, recipe)`: asserts that one and two processes did the same in a workload's folder.

    They learned from the same batches; of the same weights they found the same scores, to the last bit, and
    wrote the same predictions.
    """

    def check(folder, recipe):
        one, two = records(folder / "runs" / "alone", "train"), records(folder / "runs" / recipe, "train")
        assert len(one) == 2
        assert [step["batch_digest"] for step in one] == [step["batch_digest"] for step in two[:2]]
        # Every evaluation of either saw all of the same samples; none where there is no validation split.
        both = [*records(folder / "runs" / "alone", "eval"), *records(folder / "runs" / recipe, "eval")]
        assert len({json.dumps(one["certificate"]) for one in both}) == min(1, len(both))
        files = [results(folder, recipe, name) for name in ("one", "two")]
        assert files[0].keys() == files[1].keys()
        assert len(files[0]) > 2
        for name, path in files[0].items():
            assert path.read_bytes() == files[1][name].read_bytes(), name
        found, said = evaluation(folder, recipe), (folder / "two" / "evaluate.txt").read_text()
        assert found["certificate"]["unique"] == found["certificate"]["expected"]
        for name, value in found["metrics"].items():
            assert re.search(rf"^{name} +{re.escape(repr(value))}$", said, re.MULTILINE), name

    return check


@pytest.fixture(scope="session")
def rows():
    """`rows(file)`: the rows of a CSV, as dictionaries."""

    def read(path):
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    return read


# Digits.


@pytest.fixture(scope="session")
def glyphs():
    """`glyphs(split)[digit]`: pictures of a digit, float64 [N, 8, 8] of 0..1."""
    bundled = load_digits()
    tenth = np.arange(len(bundled.target)) % 10
    kept = {"train": tenth < 8, "val": tenth == 8, "test": tenth == 9}

    def of(split):
        chosen = [kept[split] & (bundled.target == digit) for digit in range(10)]
        return [bundled.images[rows] / 16 for rows in chosen]

    return of


def scaled(image, height, width):
    """Bilinear, float64 [H, W]."""
    picture = Image.fromarray(image.astype(np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), np.float64)


def draw_canvas(draws, glyphs, count, *, clutter):
    """`count` digits, 0 to 4, in the four quarters of a dim and noisy canvas of about 64 x 64 pixels.

    `clutter` adds as many bright strokes, which are no digits.
    """
    height, width = draws.integers(60, 72, 2)
    ramp = np.outer(np.linspace(0, 1, height), np.linspace(0, 1, width)) * draws.uniform(-30, 30)
    canvas = draws.uniform(40, 70) + ramp + draws.normal(0, 10, (height, width))
    mask, digits = np.zeros((height, width), bool), []
    for _ in range(clutter):
        top, left = draws.integers(0, height - 4), draws.integers(0, width - 4)
        across = draws.random() < 0.5
        canvas[top : top + (2 if across else 14), left : left + (14 if across else 2)] = draws.uniform(
            130, 240
        )
    for quarter in draws.choice(4, count, replace=False):
        digit = int(draws.integers(10))
        shape = glyphs[digit][draws.integers(len(glyphs[digit]))]
        side = int(draws.integers(GLYPH_SIDE - 1, GLYPH_SIDE + 3))
        ink = scaled(shape, side, side)
        top = (
            MARGIN
            + quarter // 2 * (height // 2 - MARGIN)
            + draws.integers(0, height // 2 - MARGIN - side + 1)
        )
        left = (
            MARGIN + quarter % 2 * (width // 2 - MARGIN) + draws.integers(0, width // 2 - MARGIN - side + 1)
        )
        place = np.s_[top : top + side, left : left + side]
        canvas[place] += ink * (draws.uniform(190, 230) - canvas[place])
        mask[place] |= ink > 0.4
        digits.append(digit)
    return Drawn(canvas.clip(0, 255).astype(np.uint8), mask, digits)


@pytest.fixture(scope="session")
def findings(once, glyphs):
    """findings.csv and scans/: canvases with 14 labels, one in twenty missing, and two pictures a patient.

    The first ten labels say which digits are there; the others: a bar on the left, a frame, haze, more than
    two digits.
    """

    def make(folder):
        draws = np.random.default_rng(14)
        (folder / "scans").mkdir()
        with (folder / "findings.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "patient", "split", *FINDINGS])
            for split, samples in {"train": 3072, "val": 500, "test": 300}.items():
                shapes = glyphs(split)
                for number in range(samples):
                    drawn = draw_canvas(draws, shapes, draws.choice(5, p=HOW_MANY), clutter=0)
                    pixels, (bar, frame, hazy) = drawn.pixels, draws.random(3) < 0.3
                    if bar:
                        pixels[4:-4, 2:5] = 220
                    if frame:
                        pixels[:2] = pixels[-2:] = 200
                        pixels[:, :2] = pixels[:, -2:] = 200
                    if hazy:
                        pixels = (90 + 0.55 * pixels).astype(np.uint8)
                    truth = [digit in drawn.digits for digit in range(10)]
                    truth += [bar, frame, hazy, len(drawn.digits) > 2]
                    missing = draws.random(len(truth)) < 0.05
                    cells = ["" if gone else int(one) for gone, one in zip(missing, truth, strict=True)]
                    name = f"{split}-{number:04d}.{'jpg' if number % 4 == 0 else 'png'}"
                    Image.fromarray(pixels).save(folder / "scans" / name, quality=92)
                    table.writerow([name, f"{split}-{number // 2}", split, *cells])

    return once("findings", make)


@pytest.fixture(scope="session")
def canvases(once, glyphs):
    """digits/{train,val,test}/{images,masks}: digits among bright strokes; a mask is 255 where a digit is."""

    def make(folder):
        draws = np.random.default_rng(2)
        for split, samples in {"train": 64, "val": 20, "test": 40}.items():
            for name in ("images", "masks"):
                (folder / "digits" / split / name).mkdir(parents=True)
            for number in range(samples):
                drawn = draw_canvas(draws, glyphs(split), draws.integers(1, 5), clutter=2)
                place = folder / "digits" / split
                Image.fromarray(drawn.pixels).save(place / "images" / f"{number:03d}.png")
                Image.fromarray(drawn.mask.astype(np.uint8) * 255).save(place / "masks" / f"{number:03d}.png")

    return once("canvases", make)


@pytest.fixture(scope="session")
def small_digits(once):
    """digits/0 … digits/9: all of scikit-learn's digits, 28 x 28 grey."""

    def make(folder):
        bundled = load_digits()
        for number, (image, digit) in enumerate(zip(bundled.images, bundled.target, strict=True)):
            place = folder / "digits" / str(digit)
            place.mkdir(parents=True, exist_ok=True)
            pixels = scaled(image * (255 / 16), 28, 28).round().astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{number:04d}.png")

    return once("small_digits", make)


# Photographs.


def draw_cells(draws, textures):
    """A tissue of about 90 cells, uint8 [512, 512] grey, and where their borders are, bool [512, 512].

    Cells are of real texture, their borders dark, blurred and bent; dark blobs inside them are none.
    """
    side = 512
    centres = draws.uniform(-40, side + 40, (110, 2))
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), axis=-1).astype(float)
    bend = np.stack([scaled(draws.normal(0, 7, (13, 13)), side, side) for _ in range(2)], axis=-1)
    nearest = cKDTree(centres).query(grid + bend, k=2)[0]
    border = nearest[..., 1] - nearest[..., 0] < 5
    texture = textures[draws.integers(len(textures))][:: draws.choice([-1, 1]), :: draws.choice([-1, 1])]
    tissue = 165 + 0.35 * (texture.astype(float) - texture.mean())
    for top, left in draws.integers(0, side - 18, (60, 2)):
        window = np.s_[top : top + 18, left : left + 18]
        blob = (((grid[window] - (top + 9, left + 9)) / draws.uniform(4, 9, 2)) ** 2).sum(axis=-1) < 1
        tissue[window][blob] -= draws.uniform(40, 80)
    tissue -= 110 * gaussian_filter(border.astype(float), 1.2)
    return (tissue + draws.normal(0, 12, (side, side))).clip(0, 255).astype(np.uint8), border


@pytest.fixture(scope="session")
def membranes(once):
    """em/{images,masks}: 30 pairs, 512 x 512; slices/: five more images, whose masks lie aside in truth/."""

    def make(folder):
        draws = np.random.default_rng(30)
        textures = [getattr(skimage.data, name)() for name in ("gravel", "grass", "brick")]
        for name in ("em/images", "em/masks", "slices", "truth"):
            (folder / name).mkdir(parents=True)
        for number in range(35):
            images, masks = ("em/images", "em/masks") if number < 30 else ("slices", "truth")
            pixels, border = draw_cells(draws, textures)
            Image.fromarray(pixels).save(folder / images / f"{number:02d}.png")
            Image.fromarray(border.astype(np.uint8) * 255).save(folder / masks / f"{number:02d}.png")

    return once("membranes", make)


def draw_scan(draws, photo):
    """A grey crop with speckle, dark outside of the probe's sector, uint8 [H, W]."""
    height, width = draws.integers(230, 300, 2)
    top, left = (
        int(draws.integers(0, limit - size + 1))
        for limit, size in zip(photo.shape, (height, width), strict=True)
    )
    crop = photo[top : top + height, left : left + width].astype(float)
    speckled = crop * gaussian_filter(draws.gamma(4, 1 / 4, crop.shape), 0.7)
    down, across = np.mgrid[0:height, 0:width]
    inside = np.abs(across - width / 2) < 0.28 * width + 0.45 * down
    return np.where(inside, speckled, 0).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def ultrasound(once):
    """views/CLASS/: 14 grey pictures of each of five classes; views.csv names them with their class."""

    def make(folder):
        draws = np.random.default_rng(5)
        with (folder / "views.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "class"])
            for name in VIEWS:
                photo = getattr(skimage.data, name)()
                scale = 512 / max(photo.shape)
                photo = scaled(photo, *(max(310, round(size * scale)) for size in photo.shape))
                (folder / "views" / name).mkdir(parents=True)
                for number in range(14):
                    path = f"{name}/{number:02d}.{'jpg' if number % 2 else 'png'}"
                    Image.fromarray(draw_scan(draws, photo)).save(folder / "views" / path)
                    table.writerow([path, name])

    return once("ultrasound", make)


@pytest.fixture(scope="session")
def photographs_by_class(once):
    """pictures/CLASS/: 40 crops of each of four photographs in colour; a published network's weights beside.

    resnet18.pth and resnet18.safetensors hold the same: torchvision's network for the 1000 classes of
    ImageNet, as it is before it has learned anything.
    """

    def make(folder):
        draws = np.random.default_rng(4)
        for name in ("astronaut", "chelsea", "coffee", "rocket"):
            photo = getattr(skimage.data, name)()
            (folder / "pictures" / name).mkdir(parents=True)
            for number in range(40):
                sides = draws.integers(96, 160, 2)
                top, left = draws.integers(0, photo.shape[:2] - sides)
                crop = np.ascontiguousarray(photo[top : top + sides[0], left : left + sides[1]])
                Image.fromarray(crop).save(folder / "pictures" / name / f"{number:02d}.jpg", quality=92)
        with torch.random.fork_rng():
            torch.manual_seed(18)
            weights = torchvision.models.resnet18(num_classes=1000).state_dict()
        torch.save(weights, folder / "resnet18.pth")
        save_file(weights, folder / "resnet18.safetensors")

    return once("photographs", make)
