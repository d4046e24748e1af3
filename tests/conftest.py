"""Real photographs as a user would have them: a folder per class, and the data set packed from it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

from data_pipeline.pack import pack
from data_pipeline.sources import class_folders


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
    source = class_folders(photo_folder, val_fraction=0.2, seed=0)
    pack(source, root, workers=1, seed=0, shard_samples=10, shard_bytes=1 << 30)
    return root
