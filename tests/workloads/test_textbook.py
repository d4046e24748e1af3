"""The textbook's set-up: a perceptron on small digits, and a UNet with Dice over a test set."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def perceptron(workload, small_digits):
    return workload("textbook_mlp", small_digits, train=["--train.epochs", 10])


@pytest.fixture(scope="module")
def dice(workload, canvases):
    return workload("textbook_dice", canvases)


def test_one_and_two_processes_do_the_same_with_a_perceptron(perceptron, alike, records):
    alike(perceptron, "textbook_mlp")
    one, two = (records(perceptron / "runs" / name, "train") for name in ("alone", "textbook_mlp"))
    # Without BatchNorm, only the order of additions differs.
    assert [step["loss"] for step in one] == pytest.approx([step["loss"] for step in two[:2]], rel=1e-5)
    assert two[-1]["loss"] < two[0]["loss"]
    assert {step["lr"] for step in two} == {0.001}


def test_the_perceptron_says_a_class_for_every_picture(perceptron, rows, evaluation):
    said = rows(perceptron / "two/runs/textbook_mlp/predictions.csv")
    assert len(said) == 1797
    right = np.mean([row["sample"].split("/")[0] == row["prediction"] for row in said])
    assert right == pytest.approx(evaluation(perceptron, "textbook_mlp")["metrics"]["accuracy"], abs=0.1)
    assert right > 0.4


def test_one_and_two_processes_do_the_same_with_a_unet(dice, alike):
    alike(dice, "textbook_dice")


def test_a_mean_dice_of_0_9_is_reached_over_the_test_set(dice, evaluation):
    found = evaluation(dice, "textbook_dice")
    assert found["split"] == "test"
    assert found["metrics"]["dice"] >= 0.9


def test_dice_of_the_masks_on_the_disk_is_what_evaluate_printed(dice, evaluation):
    overlap = pixels = 0
    for path in sorted((dice / "digits/test/masks").glob("*.png")):
        with (
            Image.open(path) as true,
            Image.open(dice / "two/runs/textbook_dice/predictions" / path.name) as found,
        ):
            assert found.size == true.size
            true_HW, found_HW = np.asarray(true) == 255, np.asarray(found) == 255
        overlap += 2 * int((true_HW & found_HW).sum())
        pixels += int(true_HW.sum()) + int(found_HW.sum())
    assert evaluation(dice, "textbook_dice")["metrics"]["dice"] == pytest.approx(overlap / pixels, abs=1e-6)


def test_weights_are_kept_every_twenty_epochs(dice):
    weights = dice / "runs" / "textbook_dice" / "weights"
    kept = sorted(weights.glob("epoch-*.safetensors"))
    assert [path.stem for path in kept] == ["epoch-0020", "epoch-0040"]
    early, late, last = (load_file(path) for path in (*kept, weights / "last.safetensors"))
    assert early.keys() == late.keys() == last.keys()
    assert all(late[name].equal(last[name]) for name in last)
    assert not early["head.weight"].equal(late["head.weight"])
