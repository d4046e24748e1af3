"""Real photographs as users have them, the data sets packed from them, and what is made once for all."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import os
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

from data_pipeline.digits import ensure_digits
from data_pipeline.items import SourceOptions
from data_pipeline.pack import pack
from data_pipeline.sources import find_source

LABELS = ("bright", "wide", "red")


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that all pytest-xdist processes of this test run have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def once(shared):
    """`once(name, make)`: the folder `name`, which `make(folder)` has filled exactly once."""

    def get(name, make):
        folder, done = shared / name, shared / f".{name}.done"
        with (shared / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def digits(shared):
    """The data set that comes with lockstep. Read only: copy it to damage it."""
    ensure_digits(shared / "digits")
    return shared / "digits"


@pytest.fixture
def file_limit():
    """`with file_limit(size)`: no file of this process can grow beyond so many bytes, as on a full disk."""

    @contextlib.contextmanager
    def limited(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="session")
def lockstep():
    """Runs a command as a user would."""

    def run(*words, **options):
        return subprocess.run(
            [sys.executable, "-m", "launch", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **options,
        )

    return run


@pytest.fixture(scope="session")
def refused(lockstep):
    """The code, the first line and the hint of a command that must end with two lines and nothing else."""

    def run(*words):
        done = lockstep(*words)
        assert (done.returncode, done.stdout) == (2, "")
        what, fatal = done.stderr.splitlines()
        assert what.startswith("error: ")
        code, hint = re.fullmatch(r'FATAL code=(\w+) rank=0.* hint="(.+)"', fatal).groups()
        return code, what, hint

    return run


@pytest.fixture(scope="session")
def photographs():
    """Uint8 [H, W, 3] by name."""
    temple, flower = load_sample_images().images
    pictures = {"astronaut": data.astronaut(), "coffee": data.coffee(), "cat": data.chelsea()}
    return {**pictures, "temple": temple, "flower": flower}


@pytest.fixture(scope="session")
def photo_folder(photographs, tmp_path_factory):
    """Twenty crops of different sizes for each of three classes; every fifth is a PNG, the others JPEG."""
    root = tmp_path_factory.mktemp("photos")
    for label, name in enumerate(["astronaut", "cat", "coffee"]):
        (root / name).mkdir()
        for number in range(20):
            top, left = 5 * number, 7 * number
            crop = photographs[name][top : top + 40 + number, left : left + 60 - number + label]
            extension = "png" if number % 5 == 0 else "jpg"
            Image.fromarray(np.ascontiguousarray(crop)).save(root / name / f"{number:02d}.{extension}")
    return root


@pytest.fixture(scope="session")
def photo_dataset(photo_folder, tmp_path_factory):
    """The folder packed into five shards for train and two for val. Read only: copy it to damage it."""
    root = tmp_path_factory.mktemp("packed") / "photos"
    source = find_source(photo_folder, SourceOptions(val_fraction=0.2, seed=0))
    pack(source, root, workers=1, seed=0, shard_samples=10, shard_bytes=1 << 30)
    return root


@pytest.fixture(scope="session")
def photo_table(photo_folder, tmp_path_factory):
    """A CSV of the photographs with three labels each; every seventh of one label and the next is missing."""
    path = tmp_path_factory.mktemp("table") / "labels.csv"
    pictures = sorted(photo_folder.rglob("*.*g"))
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", *LABELS, "split"])
        for number, picture in enumerate(pictures):
            with Image.open(picture) as opened:
                pixels = np.asarray(opened.convert("RGB"), np.float64)
            height, width, _ = pixels.shape
            facts = (pixels.mean() > 110, width > height, pixels[..., 0].mean() > pixels[..., 2].mean())
            labels = ["" if (number + column) % 7 == 0 else int(one) for column, one in enumerate(facts)]
            name = picture.relative_to(photo_folder).as_posix()
            rows.writerow([name, *labels, "val" if number % 4 == 0 else "train"])
    return path


@pytest.fixture(scope="session")
def multilabel_dataset(photo_folder, photo_table, tmp_path_factory):
    """The table packed: 45 samples in five shards for train, 15 in two for val. Read only."""
    root = tmp_path_factory.mktemp("packed") / "labels"
    options = SourceOptions(
        kind="csv", images=photo_folder, image_column="image", label_columns=LABELS, split_column="split"
    )
    source = find_source(photo_table, options)
    pack(source, root, workers=1, seed=0, shard_samples=10, shard_bytes=1 << 30)
    return root


@pytest.fixture(scope="session")
def mask_folder(photographs, tmp_path_factory):
    """Crops of different sizes, odd ones too, in images/, and in masks/ 255 where they are bright, else 0."""
    root = tmp_path_factory.mktemp("pairs")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    for number in range(24):
        name = ("cat", "coffee", "flower")[number % 3]
        top, left = 6 * number, 9 * number
        crop = np.ascontiguousarray(photographs[name][top : top + 48 + number % 4, left : left + 64 - number])
        bright = crop.mean(axis=2) > 110
        Image.fromarray(crop).save(root / "images" / f"{number:02d}.{'png' if number % 4 == 0 else 'jpg'}")
        Image.fromarray(bright.astype(np.uint8) * 255).save(root / "masks" / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def segmentation_dataset(mask_folder, tmp_path_factory):
    """The pairs packed: 18 in three shards for train, 6 in one for val. Read only."""
    root = tmp_path_factory.mktemp("packed") / "masks"
    source = find_source(mask_folder, SourceOptions(val_fraction=0.25, seed=0))
    pack(source, root, workers=1, seed=0, shard_samples=6, shard_bytes=1 << 30)
    return root
