"""Fine-tuning on a folder per class, from a local file of another head to predictions."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
RECIPE = "finetune"
SMALL = {
    "--data.train-transforms": "[{random_resized_crop: {size: 64, scale: [0.4, 1]}}, {horizontal_flip: {}}]",
    "--data.eval-transforms": "[{resize: {size: 72}}, {center_crop: {size: 64}}]",
}


@pytest.fixture(scope="module")
def folder(workload, photographs_by_class):
    flags = [word for pair in SMALL.items() for word in pair]
    return workload(
        RECIPE,
        photographs_by_class,
        train=[*flags, "--model.pretrained", "resnet18.pth", "--train.epochs", 5],
        alone=["--model.pretrained", "resnet18.safetensors"],
    )


@pytest.fixture(scope="module")
def before_and_after(folder):
    return load_file(folder / "resnet18.safetensors"), load_file(
        folder / "runs" / RECIPE / "weights" / "last.safetensors"
    )


def test_one_and_two_processes_do_the_same(folder, alike, records):
    alike(folder, RECIPE)
    one, two = records(folder / "runs" / "alone", "train"), records(folder / "runs" / RECIPE, "train")
    # While the body is frozen, so are its BatchNorms: nothing depends on a process's share of the batch.
    assert [step["loss"] for step in one] == pytest.approx([step["loss"] for step in two[:2]], rel=1e-4)


def test_what_was_loaded_and_what_was_left_out_is_said(folder):
    said = (folder / "train.txt").read_text()
    assert "from 'resnet18.pth'" in said
    assert "fc.weight" in said
    assert "1000" in said


def test_frozen_layers_are_the_same_bits_and_thawed_ones_are_not(before_and_after):
    before, after = before_and_after
    assert after["fc.weight"].shape == (4, 512)
    for name in before:
        if not name.startswith("fc."):
            thawed = name.startswith(("layer3.", "layer4."))
            assert torch.equal(before[name], after[name]) is not thawed, name


def test_accuracy_is_that_of_the_predicted_classes(folder, typed, commands, evaluation, rows):
    said = rows(folder / "two" / "runs" / RECIPE / "predictions.csv")
    pictures = sorted(path.relative_to(folder / "pictures") for path in (folder / "pictures").rglob("*.jpg"))
    assert [row["sample"] for row in said] == [path.as_posix() for path in pictures]
    found = evaluation(folder, RECIPE)
    assert found["metrics"]["accuracy"] > 0.5
    out = ["--predict.source", "data/photos", "--predict.out", "val.csv"]
    typed(commands(RECIPE)["predict"], *out, folder=folder)
    held_out = rows(folder / "val.csv")
    right = sum(row["sample"].split("/")[0] == row["prediction"] for row in held_out)
    assert found["metrics"]["accuracy"] == pytest.approx(right / len(held_out), abs=1e-9)
