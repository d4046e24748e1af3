"""The learning rate as a pure function of the step, and which parameters decay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.config import OptimConfig
from training.optim import OPTIMIZERS, build_optimizer, rate_at


def rates(steps, **fields):
    config = OptimConfig(**fields)
    return [rate_at(step, config, steps=steps) for step in range(steps)]


def test_the_warm_up_rises_in_equal_steps_and_reaches_the_peak_with_its_last():
    found = rates(20, lr=1.0, warmup_steps=4)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == 1.0


def test_the_cosine_falls_from_the_peak_through_the_middle_to_just_above_its_end():
    found = rates(101, lr=1.0, final_lr=0.2)
    assert found[0] == 1.0
    assert found[50] == pytest.approx(0.6, abs=0.02)
    assert found == sorted(found, reverse=True)
    assert 0.2 < found[-1] < 0.201
    assert rate_at(101, OptimConfig(lr=1.0, final_lr=0.2), steps=101) == pytest.approx(0.2)


def test_the_constant_schedule_stays_where_the_warm_up_ends():
    assert rates(6, lr=0.5, warmup_steps=2, schedule="constant") == [0.25, 0.5, 0.5, 0.5, 0.5, 0.5]


CONFIGS = st.builds(
    lambda lr, share, **fields: OptimConfig(lr=lr, final_lr=share * lr, **fields),
    lr=st.floats(0, 10),
    share=st.floats(0, 1),
    warmup_steps=st.integers(0, 50),
    schedule=st.sampled_from(["cosine", "constant"]),
)


@given(CONFIGS, st.integers(1, 200))
def test_the_rate_stays_between_nothing_and_the_peak_and_above_the_end_after_the_warm_up(config, steps):
    for step in range(steps):
        rate = rate_at(step, config, steps=steps)
        assert 0 <= rate <= config.lr * (1 + 1e-12)
        if step >= config.warmup_steps:
            assert rate >= config.final_lr * (1 - 1e-12)


def test_a_warm_up_longer_than_the_run_is_no_division_by_zero():
    assert rates(3, lr=1.0, warmup_steps=3) == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates(3, lr=1.0, warmup_steps=30)[-1] == pytest.approx(0.1)


def network():
    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_biases_and_norms_do_not_decay(name):
    model = network()
    optimizer = build_optimizer(model, OptimConfig(name=name, weight_decay=0.3))
    decay = {id(one): group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
    found = {key: decay[id(parameter)] for key, parameter in model.named_parameters()}
    assert found.pop("0.weight") == found.pop("2.weight") == 0.3
    assert set(found.values()) == {0.0}
    assert len(found) == 4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_no_gradient_only_what_decays_moves(name):
    model = network()
    before = {key: tensor.detach().clone() for key, tensor in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1, weight_decay=0.5, momentum=0.0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        expected = before[key] * 0.95 if parameter.ndim > 1 else before[key]
        torch.testing.assert_close(parameter.detach(), expected)


def test_frozen_parameters_are_left_out():
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig())
    found = {id(one) for group in optimizer.param_groups for one in group["params"]}
    assert found == {id(one) for one in model.parameters() if one.requires_grad}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_nesterovs_where_there_is_momentum(momentum):
    optimizer = build_optimizer(network(), OptimConfig(name="sgd", momentum=momentum))
    assert {group["nesterov"] for group in optimizer.param_groups} == {momentum > 0}
