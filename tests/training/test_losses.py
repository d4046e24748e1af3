"""Losses as sums and counts: how a batch was cut changes nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from training.inputs import Inputs
from training.losses import cross_entropy
from training.tasks import TASKS


def example(count=12, classes=5):
    torch.manual_seed(0)
    return torch.randn(count, classes, requires_grad=True), torch.arange(count) % classes


def all_valid(count):
    """The weights of samples that all count in full."""
    return torch.ones(count)


def test_sum_and_count_give_the_mean_that_torch_gives():
    logits, targets = example()
    loss = cross_entropy(logits, targets, all_valid(12))
    assert loss.elements == 12
    assert (loss.total / loss.elements).item() == pytest.approx(
        functional.cross_entropy(logits, targets).item()
    )


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), max_size=5))
def test_however_a_batch_is_cut_the_gradient_is_that_of_the_whole(cuts):
    logits, targets = example()
    whole = cross_entropy(logits, targets, all_valid(12))
    (reference,) = torch.autograd.grad(whole.total / whole.elements, logits)
    edges = [0, *sorted(cuts), 12]
    gradient, count, total = torch.zeros_like(reference), 0, torch.zeros(())
    for first, last in pairwise(edges):
        piece = cross_entropy(logits[first:last], targets[first:last], all_valid(last - first))
        gradient += torch.autograd.grad(piece.total / 12, logits)[0]
        count, total = count + int(piece.elements), total + piece.total.detach()
    assert count == 12
    assert total.item() == pytest.approx(whole.total.item(), rel=1e-6)
    torch.testing.assert_close(gradient, reference)


def test_samples_that_are_not_valid_count_nowhere():
    logits, targets = example()
    valid = all_valid(12).bool()
    valid[[1, 7]] = False
    loss = cross_entropy(logits, targets, valid.float())
    kept = cross_entropy(logits[valid], targets[valid], all_valid(10))
    assert loss.elements == kept.elements == 10
    assert loss.total.item() == pytest.approx(kept.total.item())
    (gradient,) = torch.autograd.grad(loss.total, logits)
    assert gradient[~valid].abs().sum() == 0
    assert gradient[valid].abs().sum() > 0


def test_a_batch_without_a_valid_sample_has_a_zero_gradient_and_not_none():
    logits, targets = example()
    loss = cross_entropy(logits, targets, torch.zeros(12))
    assert (loss.total, loss.elements) == (0, 0)
    assert torch.equal(torch.autograd.grad(loss.total, logits)[0], torch.zeros_like(logits))


def test_half_precision_logits_are_summed_in_float32():
    logits, targets = example(4096)
    loss = cross_entropy(logits.bfloat16(), targets, all_valid(4096))
    assert loss.total.dtype == torch.float32
    reference = cross_entropy(logits.bfloat16().float(), targets, all_valid(4096))
    assert loss.total.item() == pytest.approx(reference.total.item(), rel=1e-6)


def test_a_mixed_sample_counts_in_part_for_its_own_target_and_for_its_partners():
    logits, targets = example()
    share = torch.linspace(0, 1, 12)
    partners = targets.flip(0)
    valid = torch.ones(12, dtype=torch.bool)
    valid[3] = False
    inputs = Inputs(logits, targets, valid, valid.float(), share, partners)
    loss = TASKS["multiclass"](5).batch_loss(logits, inputs)
    soft = share[:, None] * functional.one_hot(targets, 5) + (1 - share[:, None]) * functional.one_hot(
        partners, 5
    )
    expected = functional.cross_entropy(logits[valid], soft[valid], reduction="sum")
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.elements.item() == pytest.approx(11)


def test_without_mixing_the_loss_of_a_batch_is_that_of_its_targets_to_the_last_bit():
    logits, targets = example()
    inputs = Inputs(logits, targets, all_valid(12).bool(), all_valid(12), all_valid(12), None)
    loss = TASKS["multiclass"](5).batch_loss(logits, inputs)
    assert torch.equal(loss.total, functional.cross_entropy(logits, targets, reduction="none").sum())
