"""Views of ultrasound, from class folders or a table to predictions."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
RECIPE = "ultrasound_classes"


@pytest.fixture(scope="module")
def folder(workload, ultrasound):
    return workload(
        RECIPE,
        ultrasound,
        train=["--train.global-batch", 8, "--train.max-steps", 2, "--eval.batch", 8],
        # The same pictures as evaluate: a large network takes its time.
        predict=["--predict.source", "data/ultrasound"],
    )


def test_one_and_two_processes_do_the_same(folder, alike):
    alike(folder, RECIPE)


def test_a_table_is_packed_like_the_folders(folder, typed, commands, ultrasound):
    written = typed(
        commands(RECIPE)["pack"].replace("pack views data/", "pack views.csv data/table_"),
        *("--images", "views"),
        folder=folder,
    )
    assert "class by column 'class', 30% of each class held out" in written
    tables = [
        json.loads((folder / "data" / name / "dataset.json").read_text())
        for name in ("ultrasound", "table_ultrasound")
    ]
    for key in ("task", "classes", "image_mode"):
        assert tables[0][key] == tables[1][key]


def test_the_head_has_five_outputs_and_accuracy_chooses_the_best_weights(folder, records):
    weights = load_file(folder / "runs" / RECIPE / "weights" / "best.safetensors")
    assert weights["fc.weight"].shape == (5, 512)
    assert (
        len([name for name in weights if name.startswith("layer3.") and name.endswith("conv2.weight")]) == 6
    )
    said = (folder / "train.txt").read_text()
    best = max(one["metrics"]["accuracy"] for one in records(folder / "runs" / RECIPE, "eval"))
    assert f"accuracy  {best:.4f} on the held-out samples" in said


def test_biases_and_norms_are_a_group_of_their_own_without_decay(folder):
    assert "biases and norms" in (folder / "train.txt").read_text()


def test_accuracy_is_that_of_the_predicted_classes(folder, evaluation, rows):
    written = folder / "two" / "runs" / RECIPE / "predictions.csv"
    said, found = rows(written), evaluation(folder, RECIPE)
    assert len(said) == found["certificate"]["expected"]
    right = sum(row["sample"].split("/")[0] == row["prediction"] for row in said)
    assert found["metrics"]["accuracy"] == pytest.approx(right / len(said), abs=1e-9)
    for row in said:
        assert sum(float(row[name]) for name in found["class_names"]) == pytest.approx(1, abs=1e-5)
        assert row["score"] == row[row["prediction"]]
