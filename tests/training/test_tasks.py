"""Scores of every task: scikit-learn's on the samples that count, however the split was cut."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from training.objective import Objective
from training.scores.confusion import MAX_CONFUSION
from training.tasks.multiclass import multiclass
from training.tasks.multilabel import multilabel
from training.tasks.segmentation import said_classes, segmentation
from training.tasks.task import Kept

NOTHING = Objective(())
SEEDS = st.integers(0, 2**32 - 1)
CUTS = st.lists(st.integers(0, 30), max_size=4)


def made(task, classes, *, outputs=None):
    return task(classes, outputs=outputs or classes, objective=NOTHING)


def findings_of(task, outputs, targets, valid=None, cuts=()):
    """What a task finds in a split that is tallied in the pieces between `cuts`."""
    valid = torch.ones(len(targets), dtype=torch.bool) if valid is None else valid
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in task.sums.items()}
    for first, last in pairwise([0, *sorted(min(cut, len(targets)) for cut in cuts), len(targets)]):
        found = task.tally(outputs[first:last], targets[first:last], valid[first:last])
        assert {name: tuple(one.shape) for name, one in found.items()} == dict(task.sums)
        assert all(one.dtype == torch.float64 for one in found.values())
        sums = {name: sums[name] + one for name, one in found.items()}
    kept = Kept(outputs.numpy(), targets.numpy()) if task.keeps_rows else None
    findings = task.score({name: one.numpy() for name, one in sums.items()}, kept)
    written = asdict(findings)
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    return findings


def same(found, expected):
    """Equal up to rounding; NaN is what scikit-learn gives where we say None."""
    if found is None or np.isnan(expected):
        return found is None and bool(np.isnan(expected))
    return type(found) is float and found == pytest.approx(float(expected), abs=1e-12)


def all_same(found, expected):
    return len(found) == len(expected) and all(map(same, found, expected))


def mean_of(scores):
    known = [score for score in scores if not np.isnan(score)]
    return np.mean(known) if known else np.nan


def drawn_classes(seed, classes):
    """Logits with ties, targets of some of the classes, and which samples count."""
    draws = torch.Generator().manual_seed(seed)
    samples = int(torch.randint(1, 30, (), generator=draws))
    present = int(torch.randint(1, classes + 1, (), generator=draws))
    logits = torch.randint(-2, 3, (samples, classes), generator=draws) / 2
    targets = torch.randint(0, present, (samples,), generator=draws)
    return logits, targets, torch.rand(samples, generator=draws) < 0.8


@pytest.mark.filterwarnings("ignore:A single label", "ignore:y_pred contains classes")
@pytest.mark.parametrize("classes", [1, 2, 5, 6, MAX_CONFUSION, MAX_CONFUSION + 1])
@settings(deadline=None, max_examples=25)
@given(SEEDS, CUTS)
def test_multiclass_scores_are_those_of_scikit_learn_however_the_split_is_cut(classes, seed, cuts):
    logits, targets, valid = drawn_classes(seed, classes)
    found = findings_of(made(multiclass, classes), logits, targets, valid, cuts)
    assert found == findings_of(made(multiclass, classes), logits[valid], targets[valid])
    assert found.metrics.keys() == (
        {"accuracy", "balanced_accuracy", "macro_f1"} | ({"top5"} if classes > 5 else set())
    )
    if not valid.any():
        assert set(found.metrics.values()) == {None}
        return
    truth, said = targets[valid].numpy(), logits.argmax(dim=1)[valid].numpy()
    everyone = {"labels": range(classes), "average": None, "zero_division": np.nan}
    assert same(found.metrics["accuracy"], sk.accuracy_score(truth, said))
    assert same(found.metrics["balanced_accuracy"], sk.balanced_accuracy_score(truth, said))
    assert same(found.metrics["macro_f1"], sk.f1_score(truth, said, average="macro"))
    assert all_same(found.classes["recall"], sk.recall_score(truth, said, **everyone))
    assert all_same(found.classes["precision"], sk.precision_score(truth, said, **everyone))
    assert all_same(found.classes["f1"], sk.f1_score(truth, said, **everyone))
    matrix = sk.confusion_matrix(truth, said, labels=range(classes)).tolist()
    assert found.confusion == (matrix if classes <= MAX_CONFUSION else None)


@settings(deadline=None)
@given(SEEDS, st.integers(6, 120))
def test_top5_is_that_of_scikit_learn_where_no_logits_are_equal(seed, classes):
    _, targets, valid = drawn_classes(seed, classes)
    draws = torch.Generator().manual_seed(seed)
    logits = torch.stack([torch.randperm(classes, generator=draws).float() for _ in targets])
    found = findings_of(made(multiclass, classes), logits, targets, valid).metrics["top5"]
    if not valid.any():
        assert found is None
        return
    everyone = {"k": 5, "labels": range(classes)}
    assert same(found, sk.top_k_accuracy_score(targets[valid].numpy(), logits[valid].numpy(), **everyone))


def test_of_very_many_classes_only_counts_of_each_are_kept():
    sums = made(multiclass, 1000).sums
    assert sum(int(np.prod(shape)) for shape in sums.values()) <= 3 * 1000 + 1
    few = made(multiclass, 100).sums
    assert few["confusion"] == (100, 100)


@pytest.mark.parametrize("target", [-2, 5])
def test_a_target_beyond_the_classes_is_not_counted_as_another(target):
    logits, targets = torch.zeros(3, 5), torch.tensor([0, target, 1])
    with pytest.raises((AssertionError, RuntimeError)):
        findings_of(made(multiclass, 5), logits, targets)


def drawn_masks(seed, classes, outputs):
    """Logits with ties, masks of some of the classes with ignored pixels, and which samples count."""
    draws = torch.Generator().manual_seed(seed)
    samples = int(torch.randint(1, 5, (), generator=draws))
    present = int(torch.randint(1, classes + 1, (), generator=draws))
    logits = torch.randint(-2, 3, (samples, outputs, 3, 5), generator=draws) / 2
    masks = torch.randint(0, present, (samples, 3, 5), generator=draws).to(torch.uint8)
    masks[torch.rand(masks.shape, generator=draws) < 0.3] = 255
    return logits, masks, torch.rand(samples, generator=draws) < 0.7


@pytest.mark.filterwarnings("ignore:A single label")
@pytest.mark.parametrize(("classes", "outputs"), [(2, 1), (2, 2), (4, 4), (101, 101), (254, 254)])
@settings(deadline=None, max_examples=25)
@given(SEEDS, CUTS)
def test_segmentation_scores_are_those_of_scikit_learn_on_the_pixels_that_count(classes, outputs, seed, cuts):
    logits, masks, valid = drawn_masks(seed, classes, outputs)
    task = made(segmentation, classes, outputs=outputs)
    found = findings_of(task, logits, masks, valid, cuts)
    counts = (masks != 255) & valid[:, None, None]
    if not counts.any():
        assert found.metrics == {"dice": None, "iou": None, "pixel_accuracy": None}
        return
    truth = masks[counts].numpy()
    probabilities = task.probabilities(logits)
    assert probabilities.shape == logits.shape
    said = (probabilities[:, 0] > 0.5).int() if outputs == 1 else probabilities.argmax(dim=1)
    assert torch.equal(said, said_classes(logits))
    said = said[counts].numpy()
    occur = np.isin(np.arange(classes), np.union1d(truth, said))
    everyone = {"labels": range(classes), "average": None, "zero_division": 0.0}
    dice = np.where(occur, sk.f1_score(truth, said, **everyone), np.nan)
    iou = np.where(occur, sk.jaccard_score(truth, said, **everyone), np.nan)
    assert all_same(found.classes["dice"], dice)
    assert all_same(found.classes["iou"], iou)
    assert same(found.metrics["dice"], mean_of(dice[1:]))
    assert same(found.metrics["iou"], mean_of(iou))
    assert same(found.metrics["pixel_accuracy"], sk.accuracy_score(truth, said))
    matrix = sk.confusion_matrix(truth, said, labels=range(classes)).tolist()
    assert found.confusion == (matrix if classes <= MAX_CONFUSION else None)


def test_a_pixel_on_the_fence_is_background():
    logits = torch.tensor([0.0, -1e-30, 1e-30]).view(1, 1, 1, 3)
    assert said_classes(logits).tolist() == [[[0, 0, 1]]]


def test_a_mask_value_beyond_the_classes_is_not_counted_as_another():
    masks = torch.tensor([[[0, 2]]], dtype=torch.uint8)
    with pytest.raises(AssertionError):
        findings_of(made(segmentation, 2, outputs=1), torch.zeros(1, 1, 1, 2), masks)


def drawn_labels(seed, labels):
    """Logits with ties and a shift by label, so that some are always or never said; missing labels."""
    draws = torch.Generator().manual_seed(seed)
    samples = int(torch.randint(1, 25, (), generator=draws))
    logits = torch.randint(-2, 3, (samples, labels), generator=draws) / 2
    logits = logits + torch.randint(-2, 3, (labels,), generator=draws)
    often = torch.rand(labels, generator=draws) * 1.4 - 0.2
    targets = (torch.rand(samples, labels, generator=draws) < often).to(torch.int8)
    targets[torch.rand(samples, labels, generator=draws) < 0.3] = -1
    return logits, targets


@settings(deadline=None)
@given(SEEDS, st.integers(1, 4))
def test_multilabel_scores_are_those_of_scikit_learn_on_the_known_labels(seed, labels):
    logits, targets = drawn_labels(seed, labels)
    task = made(multilabel, labels)
    found = findings_of(task, logits, targets)
    expected = {"auroc": [], "average_precision": [], "f1": []}
    for label in range(labels):
        known = targets[:, label] >= 0
        truth, scores = targets[known, label].numpy(), logits[known, label].numpy()
        said = scores >= 0
        expected["auroc"].append(sk.roc_auc_score(truth, scores) if len(set(truth)) == 2 else np.nan)
        positives = truth.any()
        expected["average_precision"].append(
            sk.average_precision_score(truth, scores) if positives else np.nan
        )
        expected["f1"].append(sk.f1_score(truth, said) if positives or said.any() else np.nan)
    for name, scores in expected.items():
        assert all_same(found.classes[name], scores), name
        assert same(found.metrics[name], mean_of(scores)), name
    assert found.classes["positives"] == (targets == 1).sum(dim=0).tolist()
    matches = [
        all((logit >= 0) == (target == 1) for logit, target in zip(*row, strict=True) if target >= 0)
        for row in zip(logits.tolist(), targets.tolist(), strict=True)
        if max(row[1]) >= 0
    ]
    assert same(found.metrics["exact_match"], mean_of(matches))
    for label, threshold in enumerate(found.thresholds):
        known = targets[:, label] >= 0
        truth = targets[known, label].numpy()
        if truth.any():
            probabilities = task.probabilities(logits)[known, label]
            best = max(sk.f1_score(truth, probabilities >= at) for at in probabilities)
            assert sk.f1_score(truth, probabilities >= threshold) == pytest.approx(best)


def test_where_all_labels_are_known_macro_f1_and_exact_match_are_scikit_learns_own():
    draws = torch.Generator().manual_seed(1)
    logits = torch.randn(200, 6, generator=draws)
    targets = (torch.rand(200, 6, generator=draws) < 0.4).to(torch.int8)
    found = findings_of(made(multilabel, 6), logits, targets).metrics
    said = (logits.sigmoid() >= 0.5).numpy()
    assert same(found["f1"], sk.f1_score(targets.numpy(), said, average="macro"))
    assert same(found["exact_match"], sk.accuracy_score(targets.numpy(), said))
    assert same(found["auroc"], sk.roc_auc_score(targets.numpy(), logits.numpy()))
    assert same(found["average_precision"], sk.average_precision_score(targets.numpy(), logits.numpy()))


def test_a_label_of_one_class_only_is_undefined_and_not_a_half():
    logits = torch.tensor([[1.0, -1.0, -2.0, 3.0], [2.0, -2.0, -1.0, 0.5]])
    targets = torch.tensor([[1, 0, -1, 0], [1, 0, -1, 1]], dtype=torch.int8)
    found = findings_of(made(multilabel, 4), logits, targets)
    assert found.classes["auroc"] == [None, None, None, 0.0]
    assert found.metrics["auroc"] == 0.0
    assert found.classes["average_precision"] == [1.0, None, None, 0.5]
    # That the second label is never there, and never said, is right: no reason to lower the mean.
    assert found.classes["f1"] == [1.0, None, None, pytest.approx(2 / 3)]
    assert found.thresholds[1:3] == [0.5, 0.5]


@pytest.mark.parametrize("samples", [0, 1, 5])
def test_where_no_label_is_known_every_multilabel_score_is_undefined(samples):
    found = findings_of(
        made(multilabel, 3), torch.zeros(samples, 3), torch.full((samples, 3), -1, dtype=torch.int8)
    )
    assert found.metrics == dict.fromkeys(["auroc", "average_precision", "f1", "exact_match"])
    assert found.thresholds == [0.5, 0.5, 0.5]


def test_labels_are_ranked_by_logits_whose_probabilities_are_all_one():
    logits, targets = torch.tensor([[40.0], [60.0], [50.0]]), torch.tensor([[0], [1], [1]], dtype=torch.int8)
    task = made(multilabel, 1)
    assert task.probabilities(logits).unique().tolist() == [1.0]
    assert findings_of(task, logits, targets).metrics["auroc"] == 1.0


@pytest.mark.parametrize(
    ("task", "primary"), [(multiclass, "accuracy"), (multilabel, "auroc"), (segmentation, "dice")]
)
def test_the_score_that_chooses_the_best_weights_is_among_the_metrics(task, primary):
    made_task = made(task, 3)
    assert (made_task.primary, made_task.outputs, made_task.objective) == (primary, 3, NOTHING)
    sums = {name: np.zeros(shape) for name, shape in made_task.sums.items()}
    found = made_task.score(sums, Kept(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int8)))
    assert found.metrics[primary] is None


@pytest.mark.parametrize("task", [multiclass, multilabel, segmentation])
def test_probabilities_of_half_precision_are_computed_in_float32(task):
    logits = torch.randn(2, 3, 4, 4) if task is segmentation else torch.randn(2, 3)
    found = made(task, 3).probabilities(logits.bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found, made(task, 3).probabilities(logits.bfloat16().float()))
