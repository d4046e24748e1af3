"""A loss of the user's: what it is called with, what it may give, what else is refused."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional

from data_pipeline.fault import UserError
from training.config.loss import LossTerms
from training.inputs import Inputs
from training.losses import Labels, build_objective

CODE = """
import torch
from torch.nn import functional as F

def per_sample(outputs, targets):
    return F.cross_entropy(outputs, targets.clamp(0, 2), reduction="none")

def per_logit(outputs, targets, *, power=2):
    return outputs.abs() ** power

def explosive(outputs, targets):
    return outputs[:, 0] / (targets - 7)  # infinite, and so is its slope, where the target is 7

def per_label(outputs, targets):
    return F.binary_cross_entropy_with_logits(outputs, targets.float(), reduction="none")

def per_pixel(outputs, targets):
    return (outputs[:, 0] - targets).abs()

def per_output_pixel(outputs, targets):
    return (outputs - targets[:, None]).abs()

def ratio(outputs, targets, weights):
    assert weights.dtype == torch.float32 and weights.shape == targets.shape
    return (outputs.sum(dim=1) * weights).sum(), 2 * weights.sum()

class Fixed:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, outputs, targets):
        return self.factor * outputs.sum(dim=1)

class Buffered(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.register_buffer("by_class", torch.tensor(weights))

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs, targets, self.by_class, reduction="none")

class Learning(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 1)

ready = Fixed(5.0)
number = 5
nothing = lambda outputs, targets: None
single = lambda outputs, targets: outputs.mean()
other_batch = lambda outputs, targets: outputs.sum(dim=0)
empty = lambda outputs, targets: outputs[:, :0]
right = lambda outputs, targets: outputs.argmax(dim=1) == targets
cut_off = lambda outputs, targets: outputs.detach().sum(dim=1)
one_of_two = lambda outputs, targets, weights: outputs.sum()
many_totals = lambda outputs, targets, weights: (outputs.sum(dim=1), weights.sum())
no_count = lambda outputs, targets, weights: (outputs.sum(), "many")
whole_total = lambda outputs, targets, weights: (5, 1)
no_targets = lambda outputs: outputs.sum(dim=1)
def broken(outputs, targets):
    raise KeyError("mine")
"""
CLASSES = Labels("multiclass", 3, 3, (5, 5, 5), (10, 10, 10))
FINDINGS = Labels("multilabel", 3, 3, (5, 5, 5), (10, 10, 10))
PIXELS = Labels("segmentation", 3, 3, (5, 5, 5), (10, 10, 10))


@pytest.fixture(scope="module", autouse=True)
def _module_of_the_user(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_losses.py").write_text(CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        yield


def objective_of(name, labels=CLASSES, **arguments):
    path = name if ":" in name else f"own_losses:{name}"
    return build_objective(LossTerms.model_validate({path: arguments}), labels)


def sums_of(objective, outputs, targets, weights):
    weights = torch.tensor(weights)
    inputs = Inputs(outputs, targets, weights > 0, weights, torch.ones_like(weights), None)
    return objective.sums(outputs, inputs)


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(4, 3, requires_grad=True)


TARGETS = torch.tensor([2, 0, 1, 1])
SHARES = [1.0, 0.0, 0.5, 1.0]


def test_losses_of_samples_are_weighted_and_counted(logits):
    total, count = sums_of(objective_of("per_sample"), logits, TARGETS, SHARES)
    each = functional.cross_entropy(logits, TARGETS, reduction="none")
    assert total.item() == pytest.approx((each * torch.tensor(SHARES)).sum().item())
    assert count == 2.5


def test_losses_of_several_elements_a_sample_are_all_counted(logits):
    total, count = sums_of(objective_of("per_logit", power=3), logits, TARGETS, SHARES)
    assert total.item() == pytest.approx((logits.abs() ** 3 * torch.tensor(SHARES)[:, None]).sum().item())
    assert count == 7.5


def test_what_a_sample_that_does_not_count_gives_poisons_nothing(logits):
    targets = torch.tensor([1, 7, 2, 3])
    total, count = sums_of(objective_of("explosive"), logits, targets, SHARES)
    (gradient,) = torch.autograd.grad(total, logits)
    assert total.isfinite()
    assert count == 2.5
    torch.testing.assert_close(gradient[:, 0], torch.tensor([1 / -6, 0, 0.5 / -5, 1 / -4]))
    total, _ = sums_of(objective_of("explosive"), logits, targets, [1.0] * 4)
    assert not total.isfinite()


def test_missing_labels_and_ignored_pixels_count_nowhere():
    labels = torch.tensor([[1, -1, 0], [-1, -1, 1]], dtype=torch.int8)
    total, count = sums_of(objective_of("per_label", FINDINGS), torch.zeros(2, 3), labels, [1.0, 0.5])
    assert count == 2.5
    assert total.item() == pytest.approx(2.5 * 0.6931472)
    pixels = torch.tensor([[[0, 255, 2]], [[255, 1, 255]]], dtype=torch.uint8)
    zeros = torch.zeros(2, 3, 1, 3)
    assert sums_of(objective_of("per_pixel", PIXELS), zeros, pixels, [1.0, 1.0]).tolist() == [3, 3]
    assert sums_of(objective_of("per_output_pixel", PIXELS), zeros, pixels, [1.0, 1.0]).tolist() == [9, 9]


def test_a_function_that_takes_weights_gives_a_total_and_a_count(logits):
    objective = objective_of("ratio")
    sums = sums_of(objective, logits, TARGETS, SHARES)
    total = (logits.sum(dim=1) * torch.tensor(SHARES)).sum()
    assert sums[0].item() == pytest.approx(total.item())
    assert sums[1] == 5
    assert objective.needs == "outputs"
    assert objective.value(sums.double()).item() == pytest.approx(total.item() / 5)


def test_a_class_is_called_with_its_arguments_first(logits):
    expected = logits.sum(dim=1).sum().item()
    total, _ = sums_of(objective_of("Fixed", factor=3.0), logits, TARGETS, [1.0] * 4)
    assert total.item() == pytest.approx(3 * expected)
    total, _ = sums_of(objective_of("ready"), logits, TARGETS, [1.0] * 4)
    assert total.item() == pytest.approx(5 * expected)


def test_a_loss_of_a_library_is_named_the_same_way(logits):
    objective = objective_of("torch.nn:CrossEntropyLoss", reduction="none", label_smoothing=0.1)
    ours = build_objective(LossTerms(cross_entropy={"label_smoothing": 0.1}), CLASSES)
    theirs = sums_of(objective, logits, TARGETS, SHARES)
    torch.testing.assert_close(theirs, sums_of(ours, logits, TARGETS, SHARES))


def test_a_loss_with_buffers_can_be_trained_with_after_an_evaluation(logits):
    objective = objective_of("Buffered", weights=[1.0, 2.0, 3.0])
    with torch.inference_mode():
        seen = sums_of(objective, logits.detach(), TARGETS, SHARES)
    sums = sums_of(objective, logits, TARGETS, SHARES)
    assert torch.equal(sums.detach(), seen.clone())
    assert torch.autograd.grad(sums[0], logits)[0].abs().sum() > 0


def test_weight_is_the_factor_and_no_argument(logits):
    objective = objective_of("Fixed", factor=1.0, weight=0.25)
    sums = sums_of(objective, logits, TARGETS, [1.0] * 4).double()
    assert objective.value(sums).item() == pytest.approx(logits.sum().item() / 16, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "gave a NoneType, no tensor"),
        ("single", "gave a single number for the batch"),
        ("torch.nn:CrossEntropyLoss", "gave a single number for the batch"),
        ("other_batch", r"gave losses of shape \[3\] for a batch of 4"),
        ("empty", r"gave losses of shape \[4, 0\] for a batch of 4"),
        ("right", "gave losses of type bool"),
        ("cut_off", "gave losses without a gradient"),
        ("one_of_two", "gave a Tensor, no total and count"),
        ("many_totals", "gave a total that is no 0-dimensional tensor"),
        ("whole_total", "gave a total that is no 0-dimensional tensor"),
        ("no_count", "gave a count that is no number"),
    ],
)
def test_anything_else_that_it_gives_is_refused_in_plain_words(name, said, logits):
    objective = objective_of(name)
    with pytest.raises(UserError, match=said) as refusal:
        sums_of(objective, logits, TARGETS, SHARES)
    assert refusal.value.code == "CONFIG"
    assert name in refusal.value.what
    assert "reduction='none'" in refusal.value.mend


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("number", {}, "is a int, which cannot be called"),
        ("no_targets", {}, "too many positional arguments"),
        ("per_sample", {"powr": 2}, "unexpected keyword argument 'powr'"),
        ("Fixed", {"facter": 2}, "missing a required argument: 'factor'"),
        ("Learning", {}, "parameters of its own, which nothing would train"),
        ("absent", {}, "no attribute 'absent'"),
        ("no_such_module:loss", {}, "No module named 'no_such_module'"),
    ],
)
def test_what_cannot_be_a_loss_is_refused_before_anything_runs(name, arguments, said):
    with pytest.raises(UserError, match=said) as refusal:
        objective_of(name, **arguments)
    assert refusal.value.code == "CONFIG"
    assert refusal.value.what.startswith("--loss: ")
    assert refusal.value.mend


def test_an_exception_of_the_users_own_passes_through(logits):
    with pytest.raises(KeyError, match="mine"):
        sums_of(objective_of("broken"), logits, TARGETS, SHARES)
