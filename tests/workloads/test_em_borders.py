"""Borders of cells, from thirty pairs without a validation split to a mask of every test image."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
RECIPE = "em_borders"


@pytest.fixture(scope="module")
def folder(workload, membranes):
    return workload(
        RECIPE,
        membranes,
        train=["--train.max-steps", 7],
        evaluate=["--data.root", "data/slices"],
        also=["lockstep pack slices data/slices --masks truth --val-fraction 0"],
    )


def values(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_one_and_two_processes_do_the_same(folder, alike):
    alike(folder, RECIPE)


def test_the_lowest_training_loss_chooses_the_best_weights(folder, records):
    losses = [one["loss"] for one in records(folder / "runs" / RECIPE, "train")]
    said = (folder / "train.txt").read_text()
    assert f"train_loss {min(np.mean(losses[:6]), losses[6]):.4f} in training (best" in said
    assert records(folder / "runs" / RECIPE, "eval") == []


def test_every_test_image_has_a_mask_of_its_size_in_black_and_white(folder, evaluation):
    found, true = [], []
    written = folder / "two" / "runs" / RECIPE / "predictions"
    for path in sorted((folder / "slices").glob("*.png")):
        found.append(values(written / path.name))
        true.append(values(folder / "truth" / path.name))
        assert found[-1].shape == values(path).shape == (512, 512)
        assert set(np.unique(found[-1])) == {0, 255}
        assert (written / "overlays" / path.name).exists()
    assert len(found) == 5
    found, true = np.stack(found) > 0, np.stack(true) > 0
    dice = 2 * (found & true).sum() / (found.sum() + true.sum())
    everything = 2 * true.sum() / (true.sum() + true.size)
    assert dice > everything + 0.1
    assert evaluation(folder, RECIPE)["metrics"]["dice"] == pytest.approx(dice, abs=1e-6)
