"""Update rules, the groups of parameters that they work on, and a state that a checkpoint can hold."""

from __future__ import annotations

import inspect
import json

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load, save

from training.config import OptimConfig, UserError
from training.config.update_rules import UpdateRules
from training.optim import OPTIMIZERS, build_optimizer, load_optimizer_numbers, optimizer_numbers
from training.parameter_groups import describe_groups, layers_of
from training.state import load_optimizer, optimizer_tensors, parameter_names

HEAD = frozenset({"3.weight", "3.bias"})


def network():
    """A network of 7 parameters: two convolutions, a norm, and a head of their mean."""
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()),
        torch.nn.Linear(8, 5),
    )


def build(model, *, trainable=None, head=HEAD, device_type="cpu", **fields):
    names = frozenset(name for name, _ in model.named_parameters()) if trainable is None else trainable
    config = OptimConfig(**fields)
    return build_optimizer(model, config, head=head, trainable=names, device_type=device_type)


def settings_of(model, optimizer, key):
    """Parameter's name -> what its group says."""
    by_number = {id(one): group[key] for group in optimizer.param_groups for one in group["params"]}
    return {name: by_number[id(one)] for name, one in model.named_parameters() if id(one) in by_number}


def take_step(model, optimizer, number):
    """A step with gradients that depend on the step's number only."""
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] / (number + 1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def refusal(**fields):
    with pytest.raises(UserError) as caught:
        build(network(), **fields)
    assert caught.value.code == "CONFIG"
    return caught.value.what


# What decays.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_biases_and_norms_do_not_decay(name):
    model = network()
    found = settings_of(model, build(model, name=name, weight_decay=0.3), "weight_decay")
    assert {key for key, decay in found.items() if decay == 0.3} == {"0.weight", "2.0.weight", "3.weight"}
    assert {found[key] for key in ("1.weight", "1.bias", "2.0.bias", "3.bias")} == {0.0}


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "muon"])
def test_with_no_gradient_only_what_decays_moves(name):
    model = network()
    before = weights(model)
    momentum = 0.0 if name == "sgd" else 0.5
    optimizer = build(model, name=name, lr=0.1, weight_decay=0.5, momentum=momentum)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        expected = before[key] * 0.95 if parameter.ndim > 1 else before[key]
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_rule_learns(name):
    model = network()
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    targets = images.mean(dim=(2, 3)).argmax(dim=1)
    optimizer = build(model, name=name, lr=3e-3 if name != "sgd" else 0.1)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# Who is in which group.


def test_only_what_is_trainable_is_taken_also_what_is_still_frozen():
    model = network()
    model[0].weight.requires_grad_(False)
    model[3].weight.requires_grad_(False)
    trainable = frozenset({"0.weight", "3.bias"})
    assert settings_of(model, build(model, trainable=trainable), "lr").keys() == trainable


def test_nothing_to_train_is_refused():
    assert refusal(trainable=frozenset()).startswith("model.freeze:")


def test_the_first_group_that_matches_a_name_takes_it():
    model = network()
    groups = [
        {"match": "head", "lr": 0.1},
        {"match": "2.*.weight", "weight_decay": 0.7},
        {"match": "2", "lr": 0.2},
        {"match": "body", "weight_decay": 0.01},
    ]
    optimizer = build(model, lr=0.5, weight_decay=0.3, groups=groups)
    assert settings_of(model, optimizer, "peak_lr") == {
        **{"0.weight": 0.5, "1.weight": 0.5, "1.bias": 0.5},
        **{"2.0.weight": 0.5, "2.0.bias": 0.2, "3.weight": 0.1, "3.bias": 0.1},
    }
    # A group that gives a decay means its biases and norms too.
    assert settings_of(model, optimizer, "weight_decay") == {
        **{"0.weight": 0.01, "1.weight": 0.01, "1.bias": 0.01},
        **{"2.0.weight": 0.7, "2.0.bias": 0.0, "3.weight": 0.3, "3.bias": 0.0},
    }


@pytest.mark.parametrize(
    ("pattern", "taken"),
    [
        ("2", {"2.0.weight", "2.0.bias"}),
        ("2.*", {"2.0.weight", "2.0.bias"}),
        ("2.0", {"2.0.weight", "2.0.bias"}),
        ("*.bias", {"1.bias", "2.0.bias", "3.bias"}),
        ("[01]", {"0.weight", "1.weight", "1.bias"}),
        ("1.weight", {"1.weight"}),
        ("head", {"3.weight", "3.bias"}),
        ("body", {"0.weight", "1.weight", "1.bias", "2.0.weight", "2.0.bias"}),
        ("*", {"0.weight", "1.weight", "1.bias", "2.0.weight", "2.0.bias", "3.weight", "3.bias"}),
    ],
)
def test_a_pattern_means_parameters_and_all_below_a_module(pattern, taken):
    model = network()
    found = settings_of(model, build(model, lr=1.0, groups=[{"match": pattern, "lr": 0.5}]), "peak_lr")
    assert {name for name, lr in found.items() if lr == 0.5} == taken


def test_a_pattern_that_matches_nothing_is_refused_with_names_near_it():
    model = torch.nn.ModuleDict({"layer1": torch.nn.Linear(2, 2), "fc": torch.nn.Linear(2, 2)})
    with pytest.raises(UserError, match=r"'layr1\.\*'.* layer1") as caught:
        build(model, head=frozenset(), groups=[{"match": "layr1.*"}])
    assert caught.value.code == "CONFIG"
    with pytest.raises(UserError, match=r"'xyzzy'.* layer1, fc"):
        build(model, head=frozenset(), groups=[{"match": "xyzzy"}])
    # Names are told apart by case on every system.
    assert "'LAYER'" in refusal(groups=[{"match": "LAYER"}])


def test_a_group_that_can_take_nothing_is_refused_with_the_reason():
    what = refusal(groups=[{"match": "body", "lr": 1}, {"match": "0", "lr": 2}])
    assert "'0'" in what
    assert "before it" in what
    what = refusal(groups=[{"match": "0", "lr": 2}], trainable=frozenset({"3.weight"}))
    assert "frozen" in what


def test_groups_are_described_for_people():
    groups = [{"match": "head", "lr": 0.01}]
    lines = describe_groups(build(network(), lr=1e-4, weight_decay=0.05, groups=groups))
    assert lines == [
        "the others: 792, rate 0.0001, decay 0.05",
        "the others, biases and norms: 24, rate 0.0001, decay 0",
        "head: 40, rate 0.01, decay 0.05",
        "head, biases and norms: 5, rate 0.01, decay 0",
    ]
    large = torch.nn.Linear(4000, 2800, bias=False)
    assert describe_groups(build(large, head=frozenset()))[0].startswith("all: 11.2 M, ")


# Layer-wise decay.


def test_layers_of_timms_networks_decay_as_timm_does():
    for name in ("resnet10t", "vit_tiny_patch16_224", "convnext_atto"):
        model = timm.create_model(name, num_classes=3)
        optimizer = build(model, lr=0.5, layer_decay=0.7, head=frozenset())
        ours = settings_of(model, optimizer, "peak_lr")
        theirs = {}
        for group in timm.optim.param_groups_layer_decay(model, layer_decay=0.7):
            theirs |= {id(parameter): 0.5 * group["lr_scale"] for parameter in group["params"]}
        assert ours == pytest.approx({key: theirs[id(one)] for key, one in model.named_parameters()})
        assert len(set(ours.values())) > 4
        assert max(ours.values()) == 0.5


def test_elsewhere_the_top_level_children_are_the_layers_and_the_head_is_the_last():
    model = network()
    found = settings_of(model, build(model, lr=1.0, layer_decay=0.5), "peak_lr")
    assert found == {
        **{"0.weight": 0.125, "1.weight": 0.25, "1.bias": 0.25},
        **{"2.0.weight": 0.5, "2.0.bias": 0.5, "3.weight": 1.0, "3.bias": 1.0},
    }


def test_one_child_is_looked_into_and_a_head_inside_the_body_comes_last():
    model = torch.nn.ModuleDict({"net": network()})
    layers = layers_of(model, frozenset({"net.0.weight"}))
    assert layers == {
        **{"net.1.weight": 0, "net.1.bias": 0, "net.2.0.weight": 1, "net.2.0.bias": 1},
        **{"net.3.weight": 2, "net.3.bias": 2, "net.0.weight": 3},
    }


def test_layers_and_groups_multiply():
    model = network()
    optimizer = build(model, lr=1.0, layer_decay=0.5, groups=[{"match": "2", "lr": 3.0}])
    found = settings_of(model, optimizer, "peak_lr")
    assert found["2.0.weight"] == 1.5
    assert found["0.weight"] == 0.125


def test_layer_decay_of_what_has_one_layer_is_refused():
    with pytest.raises(UserError, match="one layer only"):
        build(torch.nn.Linear(3, 3), head=frozenset(), layer_decay=0.5)


# Muon.


def test_muon_leaves_input_head_embeddings_biases_and_norms_to_adamw():
    model = network()
    optimizer = build(model, name="muon")
    take_step(model, optimizer, 0)
    chosen = {name: optimizer.state[one]["use_muon"] for name, one in model.named_parameters()}
    assert [name for name, by_muon in chosen.items() if by_muon] == ["2.0.weight"]

    vit = timm.create_model("vit_tiny_patch16_224", num_classes=9, img_size=32)
    head = frozenset({"head.weight", "head.bias"})
    by_adamw = settings_of(vit, build(vit, name="muon", head=head), "use_fallback")
    assert {name for name, fallback in by_adamw.items() if not fallback} == {
        name for name, one in vit.named_parameters() if name.startswith("blocks") and one.ndim == 2
    }


def test_muon_leaves_tables_of_embeddings_to_adamw():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Embedding(16, 8), torch.nn.Linear(8, 8))
    by_adamw = settings_of(model, build(model, name="muon", head=frozenset()), "use_fallback")
    assert [name for name, fallback in by_adamw.items() if not fallback] == ["2.weight"]


# Arguments.


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_nesterovs_where_there_is_momentum(momentum):
    optimizer = build(network(), name="sgd", momentum=momentum)
    assert {group["nesterov"] for group in optimizer.param_groups} == {momentum > 0}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_reaches_every_rule(name):
    group = build(network(), name=name, momentum=0.625).param_groups[0]
    assert 0.625 in (group.get("momentum"), group.get("betas", (None,))[0])


def test_arguments_reach_the_library_and_win_over_momentum():
    group = build(network(), momentum=0.5, arguments={"betas": [0.7, 0.9], "eps": "1e-3"}).param_groups[0]
    assert (tuple(group["betas"]), group["eps"]) == ((0.7, 0.9), 1e-3)
    group = build(network(), name="sgd", arguments={"nesterov": False}).param_groups[0]
    assert (group["nesterov"], group["momentum"]) == (False, 0.9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_argument_that_the_rule_does_not_take_is_refused_with_those_it_does(name):
    with pytest.raises(UserError, match="'epsi'") as caught:
        build(network(), name=name, arguments={"epsi": 1})
    assert caught.value.code == "CONFIG"
    known = caught.value.mend.removeprefix("it takes ").split(", ")
    assert "foreach" in known or name == "muon"
    assert not set(known) & {"lr", "params", "weight_decay", "momentum"}


@pytest.mark.parametrize("argument", ["lr", "weight_decay", "momentum"])
def test_an_argument_that_has_an_option_is_refused_with_its_name(argument):
    assert f"optim.{argument}" in refusal(name="sgd", arguments={argument: 0.1})
    assert "optim.groups" in refusal(arguments={"params": []})


def test_all_wrong_arguments_are_told_at_once():
    assert len(refusal(arguments={"lr": 1, "epss": 2, "eps": 3}).splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("adam", {"eps": -1}),
        ("adam", {"eps": "small"}),
        ("adamw", {"eps": float("nan")}),
        ("adamw", {"betas": 0.9}),
        ("adamw", {"betas": [0.9, 1.0]}),
        ("adamw", {"betas": [0.9]}),
        ("adamw", {"capturable": True}),
        ("adamw", {"differentiable": True}),
        ("adam", {"fused": True, "foreach": True}),
        ("sgd", {"nesterov": True, "dampening": 0.5}),
        ("rmsprop", {"alpha": -0.5}),
        ("nadam", {"momentum_decay": "fast"}),
        ("lamb", {"betas": 0.9}),
        ("lamb", {"betas": [1.0, 0.9]}),
        ("lion", {"betas": [0.9, 2]}),
        ("muon", {"ns_coefficients": "unknown"}),
        ("muon", {"adjust_lr_fn": "unknown"}),
        ("muon", {"conv_mode": "unknown"}),
        ("muon", {"fallback_lr_scale": float("nan")}),
    ],
)
def test_a_value_that_the_rule_does_not_work_with_is_refused_before_the_first_step(name, arguments):
    what = refusal(name=name, arguments=arguments)
    assert name in what
    assert next(iter(arguments)) in what


@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "lamb", "lion", "muon"])
def test_a_momentum_that_never_forgets_is_refused_where_it_makes_no_step(name):
    assert "optim.momentum 1" in refusal(name=name, momentum=1.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kernels_are_fused_on_a_gpu_where_torch_has_them(name):
    fused = build(network(), name=name, device_type="cuda").param_groups[0].get("fused")
    assert bool(fused) == (name in ("sgd", "adam", "adamw"))
    assert not build(network(), name=name).param_groups[0].get("fused")


def test_who_asks_for_other_kernels_gets_them():
    for arguments in ({"fused": False}, {"foreach": True}):
        optimizer = build(network(), arguments=arguments, device_type="cuda")
        assert not optimizer.param_groups[0]["fused"]


def test_the_manual_knows_every_rule_and_its_librarys_defaults():
    assert UpdateRules.model_fields.keys() == OPTIMIZERS.keys()
    for name, field in UpdateRules.model_fields.items():
        make, ours = OPTIMIZERS[name](OptimConfig(name=name))
        known = inspect.signature(make).parameters
        (told, _) = field.annotation.__args__
        for argument, shown in told.model_fields.items():
            default = ours.get(argument, known[argument].default)
            assert shown.default == default, f"{name}: {argument}"


# What a checkpoint holds.

VARIANTS = [
    *((name, {}) for name in OPTIMIZERS),
    ("sgd", {"momentum": 0.0}),
    ("adam", {"arguments": {"amsgrad": True}}),
    ("adamw", {"arguments": {"fused": True}}),
    ("rmsprop", {"momentum": 0.0, "arguments": {"centered": True}}),
    ("lamb", {"layer_decay": 0.8, "arguments": {"decoupled_decay": True, "corrected_weight_decay": True}}),
    ("muon", {"arguments": {"algo": "adamuon", "nesterov": True}}),
    ("lion", {"groups": [{"match": "head", "lr": 0.01}]}),
]


@pytest.mark.parametrize(("name", "fields"), VARIANTS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(name, fields):
    def start(model):
        model[0].weight.requires_grad_(False)  # it joins later: an update rule must not count it in before
        return Accelerator(cpu=True).prepare(build(model, name=name, **{"lr": 0.01, **fields}))

    def steps(model, optimizer, numbers):
        for number in numbers:
            model[0].weight.requires_grad_(number >= 3)
            take_step(model, optimizer, number)

    whole = network()
    optimizer = start(whole)
    steps(whole, optimizer, range(8))

    first = network()
    optimizer = start(first)
    steps(first, optimizer, range(4))
    tensors = save(optimizer_tensors(optimizer, parameter_names(first, optimizer)))
    numbers = json.dumps(optimizer_numbers(optimizer), allow_nan=False)

    second = network()
    second.load_state_dict(first.state_dict())
    optimizer = start(second)
    load_optimizer(optimizer, parameter_names(second, optimizer), load(tensors))
    load_optimizer_numbers(optimizer, json.loads(numbers))
    assert json.dumps(optimizer_numbers(optimizer)) == numbers
    steps(second, optimizer, range(4, 8))
    for key, tensor in weights(whole).items():
        assert torch.equal(weights(second)[key], tensor), key


def test_what_is_no_tensor_of_a_parameter_is_found():
    found = {}
    for name in OPTIMIZERS:
        model = network()
        optimizer = build(model, name=name)
        take_step(model, optimizer, 0)
        take_step(model, optimizer, 1)
        found[name] = optimizer_numbers(optimizer)
    assert {name for name, numbers in found.items() if numbers} == {"lamb", "muon"}
    assert found["lamb"]["groups"] == {"0": {"step": 2.0}, "1": {"step": 2.0}}
    assert {len(of) for of in found["muon"]["states"].values()} == {1}
    assert len(found["muon"]["states"]) == 7


def test_numbers_of_other_groups_are_refused():
    model = network()
    optimizer = build(model, name="lamb")
    take_step(model, optimizer, 0)
    other = build(model, name="lamb", groups=[{"match": "head", "lr": 1.0}])
    with pytest.raises(UserError) as caught:
        load_optimizer_numbers(other, optimizer_numbers(optimizer))
    assert caught.value.code == "RESUME"
