"""Gradients are clipped by one of three limits, and not at all where none was asked for."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from training.clipping import clip_gradients
from training.config import OptimConfig


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def parameters():
    """A convolution, a norm's weights, a frozen matrix without a gradient, and a head."""
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.nn.Parameter(torch.randn(shape, generator=generator))
        for shape in [(6, 3, 3, 3), (6,), (4, 4), (5, 6)]
    ]
    for one in made:
        one.grad = 10 * torch.randn(one.shape, generator=generator)
    made[2].grad = None
    return made


def clipped(accelerator, head=(), **fields):
    """The gradients before and after."""
    given = parameters()
    before = [None if one.grad is None else one.grad.clone() for one in given]
    clip_gradients(accelerator, given, OptimConfig(**fields), head=[given[index] for index in head])
    return before, [one.grad for one in given], given


def test_without_a_limit_nothing_changes(accelerator):
    before, after, _ = clipped(accelerator)
    assert after[2] is None
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True) if a is not None)


def test_the_norm_of_the_whole_gradient_is_limited_and_its_direction_stays(accelerator):
    before, after, _ = clipped(accelerator, clip_norm=0.5)
    before, after = (torch.cat([one.flatten() for one in of if one is not None]) for of in (before, after))
    assert float(after.norm()) == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(after / after.norm(), before / before.norm())


def test_a_gradient_within_its_limit_keeps_its_bits(accelerator):
    for limit in ({"clip_norm": 1e6}, {"clip_value": 1e6}, {"clip_adaptive": 1e6}):
        before, after, _ = clipped(accelerator, **limit)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True) if a is not None)


def test_values_are_limited_one_by_one(accelerator):
    before, after, _ = clipped(accelerator, clip_value=2.5)
    for a, b in zip(before, after, strict=True):
        assert b is None or torch.equal(b, a.clamp(-2.5, 2.5))
    assert after[2] is None


def test_adaptive_clipping_limits_each_unit_by_its_weights_and_spares_the_head(accelerator):
    before, after, given = clipped(accelerator, head=[3], clip_adaptive=0.02)
    assert torch.equal(after[3], before[3])
    units = given[0].detach().flatten(1).norm(dim=1).clamp(min=1e-3)
    torch.testing.assert_close(after[0].flatten(1).norm(dim=1), 0.02 * units)
    assert float(after[1].norm()) == pytest.approx(0.02 * given[1].norm().item(), rel=1e-5)
    assert after[2] is None
    assert not torch.equal(clipped(accelerator, clip_adaptive=0.02)[1][3], before[3])


def test_adaptive_clipping_looks_at_gradients_that_are_no_longer_scaled(accelerator, monkeypatch):
    """Half precision multiplies them; there is no scaler on a CPU, so this is what it would do."""
    config = OptimConfig(clip_adaptive=100)  # lets all pass as it is, and nothing that is scaled
    plain, scaled = parameters(), parameters()
    gradients = [one.grad for one in scaled if one.grad is not None]
    torch._foreach_mul_(gradients, 1024)
    monkeypatch.setattr(accelerator, "unscale_gradients", lambda: torch._foreach_div_(gradients, 1024))
    clip_gradients(accelerator, scaled, config, head=[])
    monkeypatch.undo()
    clip_gradients(accelerator, plain, config, head=[])
    for one, other in zip(plain, scaled, strict=True):
        assert one.grad is None or torch.equal(one.grad, other.grad)
