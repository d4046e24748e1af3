"""Findings in grey pictures, from a table with missing labels to predictions."""

from __future__ import annotations

import re

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
RECIPE = "chest_xray"


@pytest.fixture(scope="module")
def folder(workload, findings):
    return workload(RECIPE, findings)


@pytest.fixture(scope="module")
def truth(rows, findings):
    """The cells of a label's column by picture: "1", "0" or nothing."""
    return {row["image"]: row for row in rows(findings / "findings.csv")}


@pytest.fixture(scope="module")
def logits(folder, typed, commands, rows):
    """Of the packed scans, which come in the same batches: another cut changes the last bits."""
    packed = ["--predict.source", f"data/{RECIPE}", "--predict.scores", "logits", "--predict.out", "val.csv"]
    typed(commands(RECIPE)["predict"], *packed, folder=folder)
    return rows(folder / "val.csv")


def test_a_mean_auroc_of_0_98_is_reached(folder, evaluation):
    found = evaluation(folder, RECIPE)
    assert found["metrics"]["auroc"] >= 0.98
    low, high = found["intervals"]["auroc"]["mean"]
    assert low < found["metrics"]["auroc"] < high


def test_one_and_two_processes_do_the_same(folder, alike):
    alike(folder, RECIPE)


def test_the_loss_is_printed_at_every_step(folder, records):
    steps = [one["step"] for one in records(folder / "runs" / RECIPE, "train")]
    said = [
        line
        for line in (folder / "train.txt").read_text().splitlines()
        if re.search(r"  step \d+/240  loss 0\.\d{4}  ", line)
    ]
    assert len(said) == len(steps) == steps[-1]


def test_scores_of_each_label_are_those_of_scikit_learn_on_the_predictions(folder, logits, evaluation, truth):
    said, found = logits, evaluation(folder, RECIPE)
    assert [row["error"] for row in said] == [""] * found["certificate"]["expected"]
    pictures = {name.rsplit(".", 1)[0]: row for name, row in truth.items()}
    for name, score in {"auroc": roc_auc_score, "average_precision": average_precision_score}.items():
        expected = []
        for label in found["class_names"]:
            known = [(pictures[row["sample"]][label], float(row[label])) for row in said]
            known = [(cell, logit) for cell, logit in known if cell]
            expected.append(score([cell == "1" for cell, _ in known], [logit for _, logit in known]))
        assert len(known) < len(said)
        assert found["classes"][name] == pytest.approx(expected, abs=1e-9)
        assert found["metrics"][name] == pytest.approx(np.mean(expected), abs=1e-9)


def test_every_scan_has_a_row_that_finds_by_the_chosen_thresholds(folder, evaluation, rows, truth):
    said = rows(folder / "two" / "runs" / RECIPE / "predictions.csv")
    assert [row["sample"] for row in said] == sorted(truth)
    thresholds = dict(
        zip(*(evaluation(folder, RECIPE)[name] for name in ("class_names", "thresholds")), strict=True)
    )
    right = []
    for row in said:
        for label, threshold in thresholds.items():
            assert int(row[f"{label}_found"]) == (float(row[label]) >= threshold)
            right.append(row[f"{label}_found"] == truth[row["sample"]][label])
    assert np.mean(right) > 0.85  # one label in twenty is missing, and never right
