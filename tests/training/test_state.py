"""The training state as tensors by name: it goes out and comes back without a bit changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data_pipeline.index import read_dataset
from training.command import read_request
from training.config import OptimConfig, UserError
from training.optim import build_optimizer
from training.state import (
    Best,
    Progress,
    check_plan,
    load_model,
    load_optimizer,
    optimizer_tensors,
    parameter_names,
    plan_identity,
)


def optimizer_of(model, config):
    names = frozenset(name for name, _ in model.named_parameters())
    return build_optimizer(model, config, head=frozenset(), trainable=names, device_type="cpu")


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 3)
    )


def step(model, optimizer, number):
    torch.manual_seed(number)
    loss = model(torch.randn(5, 1, 8, 8)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


CONFIGS = [
    OptimConfig(name="sgd", lr=0.1),
    OptimConfig(name="sgd", lr=0.1, momentum=0.0),
    OptimConfig(name="adamw", lr=0.01),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.name} {config.momentum}")
def test_an_optimizer_that_is_put_back_goes_on_to_the_same_bits(config):
    straight = network()
    optimizer = optimizer_of(straight, config)
    for number in range(3):
        step(straight, optimizer, number)
    saved_weights = weights(straight)
    saved = {
        name: tensor.clone()
        for name, tensor in optimizer_tensors(optimizer, parameter_names(straight, optimizer)).items()
    }
    for number in range(3, 6):
        step(straight, optimizer, number)

    resumed = network()
    load_model(resumed, saved_weights, origin="a file")
    optimizer = optimizer_of(resumed, config)
    names = parameter_names(resumed, optimizer)
    load_optimizer(optimizer, names, saved)
    assert same(optimizer_tensors(optimizer, names), saved)
    for number in range(3, 6):
        step(resumed, optimizer, number)
    assert same(weights(resumed), weights(straight))


def test_optimizer_tensors_are_named_after_the_parameters_they_belong_to():
    model = network()
    optimizer = optimizer_of(model, OptimConfig(name="adamw"))
    assert optimizer_tensors(optimizer, parameter_names(model, optimizer)) == {}
    step(model, optimizer, 0)
    tensors = optimizer_tensors(optimizer, parameter_names(model, optimizer))
    for name, parameter in model.named_parameters():
        assert tensors[f"exp_avg/{name}"].shape == parameter.shape
        assert tensors[f"step/{name}"] == 1
    assert len(tensors) == 3 * len(list(model.parameters()))


def test_a_network_that_does_not_fit_is_refused_with_every_difference():
    tensors = weights(network())
    tensors["0.weight"] = tensors["0.weight"][:2]
    tensors["3.bias"] = tensors["3.bias"].double()
    tensors["4.weight"] = torch.zeros(1)
    del tensors["1.running_mean"]
    model = network()
    before = weights(model)
    with pytest.raises(UserError) as caught:
        load_model(model, tensors, origin="here.safetensors")
    assert caught.value.code == "RESUME"
    lines = caught.value.what.splitlines()
    assert len(lines) == 4
    assert all("here.safetensors" in line for line in lines)
    for line, name in zip(lines, ["0.weight", "1.running_mean", "3.bias", "4.weight"], strict=True):
        assert name in line
    assert "[2, 1, 3, 3]" in lines[0]
    assert "[4, 1, 3, 3]" in lines[0]
    assert "float64" in lines[2]
    assert same(weights(model), before), "nothing was loaded"


def test_of_many_differences_the_first_ten_are_named():
    tensors = {f"{number:02d}.weight": torch.zeros(1) for number in range(20)}
    with pytest.raises(UserError) as caught:
        load_model(network(), tensors, origin="here.safetensors")
    lines = caught.value.what.splitlines()
    assert len(lines) == 11
    assert lines[-1] == f"and {20 + len(network().state_dict()) - 10} more"


def test_another_data_set_is_refused_with_what_differs(digits):
    config, dataset = read_request(["--data.root", str(digits)]).config, read_dataset(digits)
    recorded = plan_identity(config, dataset)
    check_plan(recorded, config, dataset)
    first, *others = dataset.split("train").shards
    split = replace(dataset.split("train"), shards=(replace(first, samples=first.samples - 1), *others))
    changed = replace(dataset, splits={**dataset.splits, "train": split}, classes=("x", *dataset.classes[1:]))
    with pytest.raises(UserError) as caught:
        check_plan(recorded, config, changed)
    assert caught.value.code == "RESUME"
    assert caught.value.what.splitlines()[1:] == [
        "it differs in class 0: 0 -> x",
        "it differs in samples of train: 1438 -> 1437",
    ]


@pytest.mark.parametrize(
    "progress", [Progress(), Progress(7, 5, None, 900), Progress(7, 7, Best(5, "accuracy", 0.1 + 0.2), 900)]
)
def test_progress_survives_json(progress):
    import json

    assert Progress.from_json(json.loads(json.dumps(progress.as_json()))) == progress


def test_optimizer_state_of_another_network_is_refused_by_the_names_of_its_tensors():
    model = network()
    optimizer = optimizer_of(model, OptimConfig(name="adamw"))
    names = parameter_names(model, optimizer)
    step(model, optimizer, 0)
    tensors = optimizer_tensors(optimizer, names)
    tensors["exp_avg/0.weight"] = tensors["exp_avg/0.weight"][:2]
    tensors["exp_avg/9.weight"] = torch.zeros(3)
    with pytest.raises(UserError) as caught:
        load_optimizer(optimizer, names, tensors)
    assert caught.value.code == "RESUME"
    shape, stranger = caught.value.what.splitlines()
    assert "exp_avg/0.weight: [2, 1, 3, 3] in the file, [4, 1, 3, 3] in the network" in shape
    assert "exp_avg/9.weight: no such parameter" in stranger
