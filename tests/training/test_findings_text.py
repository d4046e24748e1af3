"""The tables below an evaluation's scores: every class, what is undefined and why, intervals."""

from __future__ import annotations

import numpy as np
import pytest

from training.objective import Objective
from training.scores.bootstrap import intervals
from training.scores.text import UNDEFINED, lines
from training.tasks.multiclass import multiclass
from training.tasks.multilabel import multilabel
from training.tasks.segmentation import segmentation
from training.tasks.task import Findings, Kept


def test_a_label_has_its_scores_with_intervals_and_the_reason_why_one_is_undefined():
    findings = Findings(
        {"auroc": 0.8, "f1": 0.5},
        {"auroc": [0.8, None], "f1": [0.5, 0.5], "positives": [12.0, 0.0]},
        thresholds=[0.25, 0.5],
    )
    found = {"auroc": {"mean": [0.7, 0.875], "classes": [[0.71, 0.86], None]}}
    assert lines(findings, ("mass", "[red]nodule[/]"), intervals=found) == [
        "",
        "class                           auroc      f1   positives   threshold",
        "mass             0.800 [0.710, 0.860]   0.500          12       0.250",
        "[red]nodule[/]              undefined   0.500           0       0.500",
        "mean             0.800 [0.700, 0.875]",
        "",
        "in brackets: 95 % intervals, by bootstrap",
        "undefined auroc: only one class among the known labels, or outputs that are not numbers",
    ]


def test_a_small_confusion_matrix_is_shown_and_one_too_wide_has_numbers_above(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    findings = Findings({}, {}, [[3, 1], [0, 12345]])
    assert lines(findings, ("cat", "dog"), intervals=None) == [
        "",
        "truth \\ said   cat     dog",
        "cat              3       1",
        "dog              0   12345",
    ]
    long = ("c" * 60, "d" * 60)
    assert lines(findings, long, intervals=None) == [
        "",
        "truth \\ said" + " " * 50 + "   0       1",
        f"0 {long[0]}   3       1",
        f"1 {long[1]}   0   12345",
    ]


@pytest.mark.parametrize("classes", [12, 13])
def test_a_confusion_matrix_of_many_classes_is_not_shown(classes):
    findings = Findings({}, {}, np.eye(classes, dtype=int).tolist())
    names = tuple(f"c{number}" for number in range(classes))
    assert bool(lines(findings, names, intervals=None)) is (classes == 12)


@pytest.mark.parametrize("defined", [0, 1, 10, 31, 40])
def test_of_many_classes_the_worst_and_the_best_are_shown(defined):
    scores = [(7 * number % 40) / 40 if number < defined else None for number in range(40)]
    names = tuple(f"c{number}" for number in range(40))
    text = lines(Findings({}, {"f1": scores}), names, intervals=None)
    rows = text[2:33]
    assert rows[15] == "(10 not shown)"
    shown = [row.split() for row in rows[:15] + rows[16:]]
    assert len({name for name, _ in shown}) == 30
    known = [float(score) for _, score in shown if score != "undefined"]
    ordered = sorted(score for score in scores if score is not None)
    expected = ordered if defined <= 30 else ordered[:15] + ordered[-15:]
    assert known == pytest.approx(expected, abs=5e-4)
    assert text[34] == "shown: the 15 classes of lowest f1 and the 15 of highest"


@pytest.mark.parametrize("task", [multiclass, multilabel, segmentation])
@pytest.mark.parametrize("classes", [2, 40])
def test_findings_of_every_task_can_be_shown_where_nothing_is_defined(task, classes):
    made = task(classes, outputs=classes, objective=Objective(()))
    kept = Kept(np.zeros((0, classes), np.float32), np.zeros((0, classes), np.int8))
    findings = made.score({name: np.zeros(shape) for name, shape in made.sums.items()}, kept)
    found = intervals(kept, resamples=3, seed=0) if made.keeps_rows else None
    text = "\n".join(lines(findings, tuple(map(str, range(classes))), intervals=found))
    for name in findings.classes.keys() & UNDEFINED.keys():
        assert UNDEFINED[name] in text
    assert findings.classes.keys() - UNDEFINED.keys() <= {"positives"}
