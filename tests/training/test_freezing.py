"""Freezing: what patterns mean, that frozen layers keep every bit, and that thawed ones move."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.fault import UserError
from training.freezing import apply_freezing, plan_freezing, train_mode
from training.networks.build import build_network, head_names

NAMES = (
    "conv1.weight",
    "bn1.weight",
    "bn1.bias",
    "layer1.0.conv1.weight",
    "layer1.0.bn1.weight",
    "layer10.0.conv1.weight",
    "fc.weight",
    "fc.bias",
)
HEAD = frozenset({"fc.weight", "fc.bias", "fc.running_mean"})


def plan(*freeze, names=NAMES, head=HEAD, fixed=frozenset(), **unfreeze):
    late = {name.replace("_", "."): step for name, step in unfreeze.items()}
    return plan_freezing(names, head=head, freeze=freeze, unfreeze=late, fixed=fixed)


def refusal(*freeze, **options):
    with pytest.raises(UserError) as caught:
        plan(*freeze, **options)
    assert caught.value.code == "CONFIG"
    assert caught.value.mend
    return caught.value.what


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        ([], set()),
        (["conv1"], {"conv1.weight"}),
        (["layer1"], {"layer1.0.conv1.weight", "layer1.0.bn1.weight"}),
        (["layer1.*"], {"layer1.0.conv1.weight", "layer1.0.bn1.weight"}),
        (["layer1*"], {name for name in NAMES if name.startswith("layer1")}),
        (["*.weight"], {name for name in NAMES if name.endswith(".weight")}),
        (["head"], {"fc.weight", "fc.bias"}),
        (["body"], set(NAMES) - HEAD),
        (["*", "!head"], set(NAMES) - HEAD),
        (["body", "!layer1"], set(NAMES) - HEAD - {"layer1.0.conv1.weight", "layer1.0.bn1.weight"}),
        (["body", "!*.bn1", "bn1.bias"], {name for name in NAMES[:-2] if name != "layer1.0.bn1.weight"}),
        (["body", "!layer1*", "layer1.0.bn1"], {*NAMES[:3], "layer1.0.bn1.weight"}),
    ],
)
def test_patterns_name_parameters_modules_head_or_body_and_the_last_match_wins(patterns, frozen):
    found = plan(*patterns)
    assert found.frozen_at(0) == found.frozen_at(10**9) == frozen
    assert found.trainable == set(NAMES) - frozen
    assert found.thaw_steps == ()


def test_unfreezing_happens_at_its_step_and_the_earliest_of_several_counts():
    found = plan("body", layer10=5, layer1=3, body=9, conv1=0)
    assert found.thaw_steps == (3, 5, 9)
    assert "conv1.weight" not in found.frozen_at(0)
    assert "layer1.0.conv1.weight" in found.frozen_at(2)
    assert "layer1.0.conv1.weight" not in found.frozen_at(3)
    assert found.frozen_at(5) == {"bn1.weight", "bn1.bias"}
    assert found.frozen_at(9) == set()
    assert found.trainable == set(NAMES)


@given(
    st.lists(st.sampled_from(["body", "head", "layer1", "*.weight", "bn1.?ias", "conv1"]), max_size=3),
    st.dictionaries(st.sampled_from(["body", "head", "*", "layer1.*", "conv1"]), st.integers(0, 6)),
)
def test_what_is_frozen_only_ever_shrinks_and_only_at_the_steps_that_are_told(freeze, unfreeze):
    try:
        found = plan_freezing(NAMES, head=HEAD, freeze=freeze, unfreeze=unfreeze)
    except UserError:
        return
    stages = [found.frozen_at(step) for step in range(8)]
    assert all(later <= earlier for earlier, later in pairwise(stages))
    assert found.thaw_steps == tuple(step for step in range(1, 8) if stages[step] != stages[step - 1])
    assert found.trainable == set(NAMES) - stages[-1]
    assert stages[0] < set(NAMES)


@pytest.mark.parametrize("pattern", ["layer2", "layer1.0.conv9.*", "Conv1", "!layer2", ""])
def test_a_pattern_that_matches_nothing_is_refused_with_names_near_it(pattern):
    what = refusal("body", pattern)
    assert f"{pattern.removeprefix('!')!r} matches no parameter" in what
    assert any(near in what for near in ("layer1", "conv1"))


def test_exceptions_and_unfreezing_that_change_nothing_are_refused():
    assert "excepts nothing" in refusal("!head")
    assert "excepts nothing" in refusal("layer1", "!conv1")
    assert "names nothing that is frozen" in refusal("layer1", conv1=3)
    assert "matches no parameter" in refusal("layer1", layer9=3)


def test_that_nothing_learns_is_refused_also_if_only_for_a_while():
    assert refusal("*").endswith("nothing is left to learn")
    assert refusal("*", fc=4).endswith("nothing is left to learn before step 4")


def test_what_a_library_holds_fast_never_learns():
    fixed = frozenset({"conv1.weight"})
    found = plan("layer1", fixed=fixed, layer1=2)
    assert "conv1.weight" in found.frozen_at(99)
    assert found.trainable == set(NAMES) - fixed
    assert "names nothing that is frozen" in refusal("layer1", fixed=fixed, conv1=2)


def learn(network, freezing, steps, start=0):
    """As the loop does it: SGD on what is not frozen, modes set before each step."""
    generator = torch.Generator().manual_seed(0)
    for step in range(start, start + steps):
        frozen = freezing.frozen_at(step)
        apply_freezing(network, frozen)
        train_mode(network, frozen)
        optimizer = torch.optim.SGD([one for one in network.parameters() if one.requires_grad], lr=0.1)
        images = torch.rand(4, 3, 32, 32, generator=generator) + 1
        network(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def changed(before, network):
    after = network.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize("name", ["resnet10t", "torchvision/resnet18"])
def test_frozen_layers_keep_every_bit_and_their_running_statistics_too_until_they_thaw(name):
    asked = {"task": "multiclass", "channels": 3, "outputs": 5, "arguments": {}}
    torch.manual_seed(0)
    network, head = build_network(name, **asked), head_names(name, **asked)
    names = [one for one, _ in network.named_parameters()]
    freezing = plan_freezing(names, head=head, freeze=["body", "!layer4"], unfreeze={"layer3": 2})
    whole = [*names, *(one for one, _ in network.named_buffers())]

    before = copy.deepcopy(network.state_dict())
    learn(network, freezing, 2)
    assert changed(before, network) == {one for one in whole if one.startswith(("layer4.", "fc."))}

    before = copy.deepcopy(network.state_dict())
    learn(network, freezing, 2, start=2)
    assert changed(before, network) == {one for one in whole if one.startswith(("layer3.", "layer4.", "fc."))}


def test_the_rest_of_the_network_trains_as_ever():
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout(), torch.nn.BatchNorm1d(2)).eval()
    train_mode(network, frozenset({"0.weight", "0.bias", "2.weight"}))
    assert [module.training for module in network.modules()] == [True, False, True, True]
    train_mode(network, frozenset())
    assert all(module.training for module in network.modules())


def test_a_normalisation_without_parameters_goes_by_the_module_around_it():
    def block():
        return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2, affine=False))

    network = torch.nn.Sequential(block(), block(), torch.nn.BatchNorm1d(2, affine=False))
    train_mode(network, frozenset({"0.0.weight", "0.0.bias", "1.0.weight"}))
    assert [network[0][1].training, network[1][1].training, network[2].training] == [False, True, True]
    apply_freezing(network, frozenset({"0.0.weight"}))
    assert [one.requires_grad for one in network.parameters()] == [False, True, True, True]
