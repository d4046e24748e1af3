"""Networks by name: shapes, sizes, heads, refusals, and the options that change how they compute."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.fault import UserError
from training.config.model import ModelConfig
from training.networks.build import build_network, head_names, library_of, network_like
from training.networks.options import apply_options, checkpoint_activations
from training.networks.unet import UNet

OWN = """
import torch

class Net(torch.nn.Module):
    def __init__(self, channels, outputs, width=4):
        super().__init__()
        self.body = torch.nn.Conv2d(channels, width, 3, padding=1)
        self.last = torch.nn.Conv2d(width, outputs, 1)
    def forward(self, images):
        return self.last(self.body(images))

class Flat(Net):
    def forward(self, images):
        return super().forward(images).mean(dim=(2, 3))

class Two(Flat):
    def forward(self, images):
        return super().forward(images), images

class Picky(Flat):
    def __init__(self, channels, outputs):
        super().__init__(channels, outputs)
        self.scale = float(self.last.weight.sum())

def words(channels, outputs):
    return "not a network"

def broken(channels, outputs):
    return torch.nn.Linear(channels, "many")
"""

LIGHT = {"decoder_channels": [16, 8, 8, 4, 4], "encoder_name": "resnet18"}
SMALL = [
    ("test_resnet", "multiclass", {}),
    ("timm/resnet10t", "multilabel", {}),
    ("torchvision/squeezenet1_1", "multiclass", {}),
    ("torchvision/googlenet", "multiclass", {}),
    ("mlp", "multiclass", {"height": 50, "width": 67, "hidden": [8], "dropout": 0.1}),
    ("mynets:Flat", "multilabel", {}),
    ("mynets:Net", "segmentation", {"width": 2}),
    ("unet", "segmentation", {"width": 2, "depth": 3}),
    ("unet", "segmentation", {"width": 2, "depth": 2, "norm": False, "upsampling": "bilinear"}),
    ("smp/Unet", "segmentation", LIGHT),
    ("smp/FPN", "segmentation", {"encoder_name": "tu-test_resnet", "encoder_depth": 4}),
]


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """In a folder with a module of the user's, and with no way to a hub."""
    (tmp_path / "mynets.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)


def build(name, task="multiclass", channels=1, outputs=3, **arguments):
    return build_network(name, task=task, channels=channels, outputs=outputs, arguments=arguments)


def heads(name, task="multiclass", channels=1, outputs=3, **arguments):
    return head_names(name, task=task, channels=channels, outputs=outputs, arguments=arguments)


def refusal(call, *words, **options):
    with pytest.raises(UserError) as caught:
        call(*words, **options)
    assert caught.value.code == "CONFIG"
    assert caught.value.mend
    return caught.value.what


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("name", "task", "arguments"), SMALL, ids=lambda one: one if str(one) == one else "")
def test_every_kind_of_network_learns_from_pictures_of_odd_size_and_of_any_channels(
    name, task, arguments, channels
):
    network = build(name, task, channels, **arguments)
    logits = network.train()(torch.rand(2, channels, 50, 67))
    assert logits.shape == ((2, 3, 50, 67) if task == "segmentation" else (2, 3))
    logits.square().sum().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in network.parameters())


@pytest.mark.parametrize("architecture", ["UnetPlusPlus", "DeepLabV3Plus", "Segformer"])
def test_segmentation_networks_that_need_divisible_sizes_take_any(architecture):
    network = build(f"smp/{architecture}", "segmentation", encoder_name="resnet18").eval()
    bare = smp.create_model(architecture, "resnet18", encoder_weights=None, in_channels=1, classes=3)
    bare.load_state_dict(network.state_dict())
    whole = torch.rand(1, 1, 64, 96)
    with torch.inference_mode():
        assert torch.equal(network(whole), bare.eval()(whole))
        odd = network(whole[..., :50, :67])
        right = 80 - 67 if architecture == "DeepLabV3Plus" else 96 - 67
        padded = torch.nn.functional.pad(whole[..., :50, :67], (0, right, 0, 14), mode="replicate")
        assert torch.equal(odd, bare(padded)[..., :50, :67])
        assert torch.equal(copy.deepcopy(network)(whole[..., :50, :67]), odd)


@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 4),
    st.sampled_from(["transposed", "bilinear"]),
)
@settings(max_examples=25, deadline=None)
def test_the_plain_unet_gives_each_pixel_its_logits_whatever_the_size(height, width, depth, upsampling):
    network = UNet(1, 2, width=1, depth=depth, upsampling=upsampling).eval()
    assert network(torch.rand(1, 1, height, width)).shape == (1, 2, height, width)


def test_the_plain_unet_is_as_large_as_the_one_of_the_paper():
    with torch.device("meta"):
        network = UNet(1, 2, norm=False)
    assert sum(one.numel() for one in network.parameters()) == 31_030_658


@pytest.mark.parametrize(
    ("name", "task", "arguments", "head"),
    [
        ("resnet10t", "multiclass", {}, {"fc.weight", "fc.bias"}),
        ("deit_tiny_distilled_patch16_224", "multiclass", {}, {"head", "head_dist"}),
        ("torchvision/squeezenet1_1", "multilabel", {}, {"classifier.1"}),
        ("torchvision/vit_b_32", "multiclass", {}, {"heads.head"}),
        ("smp/Unet", "segmentation", LIGHT, {"segmentation_head.0"}),
        ("unet", "segmentation", {"width": 2}, {"head"}),
        ("mlp", "multiclass", {"height": 8, "width": 8}, {"head"}),
        ("mynets:Flat", "multiclass", {}, {"last"}),
        ("mynets:Picky", "multiclass", {}, {"last"}),
    ],
)
def test_the_head_is_what_depends_on_the_number_of_outputs(name, task, arguments, head):
    before = torch.get_rng_state()
    expected = {
        whole
        for one in head
        for whole in ([one] if one.endswith(("weight", "bias")) else [f"{one}.weight", f"{one}.bias"])
    }
    assert heads(name, task, **arguments) == expected
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "task", "arguments"), SMALL, ids=lambda one: one if str(one) == one else "")
def test_what_model_json_says_rebuilds_the_network(name, task, arguments):
    about = json.loads(json.dumps(library_of(name, channels=1, outputs=3, arguments=arguments)))
    again = network_like(about, task=task, outputs=about["outputs"])
    again.load_state_dict(build(name, task, **arguments).state_dict())


def test_what_model_json_says_rebuilds_it_with_the_bare_library():
    about = library_of("torchvision/googlenet", channels=3, outputs=5, arguments={"dropout": 0.1})
    bare = torchvision.models.get_model(about["name"], num_classes=about["outputs"], **about["arguments"])
    bare.load_state_dict(build("torchvision/googlenet", channels=3, outputs=5).state_dict())
    about = library_of("timm/resnet10t", channels=1, outputs=5, arguments={})
    assert (about["library"], about["name"]) == ("timm", "resnet10t")
    bare = timm.create_model(about["name"], in_chans=about["channels"], num_classes=about["outputs"])
    bare.load_state_dict(build("resnet10t", outputs=5).state_dict())


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet81", "resnet18"),
        ("vit_b_16", "torchvision/vit_b_16"),
        ("torchvision/resnet81", "torchvision/resnet18"),
        ("MLP", "mlp"),
        ("timm/resnet10", "resnet10t"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_that_exists(name, near):
    assert f"(did you mean {near}?)" in refusal(build, name)


def test_an_unknown_decoder_or_encoder_is_refused_with_the_nearest_that_exists():
    assert "did you mean smp/Unet?" in refusal(build, "smp/Unett", "segmentation")
    what = refusal(build, "smp/Unet", "segmentation", encoder_name="resnet81")
    assert what.startswith("model.arguments")
    assert "did you mean resnet18?" in what


@pytest.mark.parametrize(
    ("name", "task", "arguments", "words"),
    [
        ("resnet10t", "multiclass", {"depths": 3}, "unexpected keyword argument 'depths'"),
        ("torchvision/resnet18", "multiclass", {"depths": 3}, "unexpected keyword argument 'depths'"),
        ("smp/Unet", "segmentation", {"depths": 3}, "no argument depths"),
        ("smp/Unet", "segmentation", {"encoder_name": "tu-test_resnet", "depths": 3}, "argument 'depths'"),
        ("unet", "segmentation", {"depths": 3}, "unexpected keyword argument 'depths'"),
        ("unet", "segmentation", {"upsampling": "nearest"}, "there are transposed, bilinear"),
        ("mlp", "multiclass", {"height": 8}, "'width'"),
        ("mynets:Flat", "multiclass", {"depths": 3}, "unexpected keyword argument 'depths'"),
        ("mynets:words", "multiclass", {}, "gives a str, not a torch.nn.Module"),
        ("mynets:broken", "multiclass", {}, "mynets.py line"),
        ("mynets:Nett", "multiclass", {}, "has no attribute 'Nett'"),
        ("resnet10t", "multiclass", {"num_classes": 3}, "num_classes cannot be set here"),
        ("smp/Unet", "segmentation", {"encoder_weights": "imagenet"}, "encoder_weights cannot be set"),
        ("resnet10t.nobody", "multiclass", {}, "Invalid pretrained tag (nobody)"),
        ("../resnet18", "multiclass", {}, "no network '../resnet18'"),
    ],
)
def test_what_a_library_does_not_know_is_refused_in_its_words(name, task, arguments, words):
    assert words in refusal(build, name, task, **arguments)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("unet", "multiclass"),
        ("smp/Unet", "multilabel"),
        ("resnet10t", "segmentation"),
        ("torchvision/resnet18", "segmentation"),
        ("mlp", "segmentation"),
    ],
)
def test_a_network_for_another_task_is_refused(name, task):
    assert f"{name!r} is no network for task {task}" in refusal(build, name, task)


@pytest.mark.parametrize(
    ("name", "task", "words"),
    [
        ("mynets:Two", "multiclass", "gives a tuple"),
        ("mynets:Net", "multiclass", "gives [2, 3, 8, 8] for pictures [2, 1, 8, 8]"),
        ("mynets:Flat", "segmentation", "need a tensor [2, 3, 8, 8]"),
    ],
)
def test_a_network_that_gives_something_else_is_refused_at_its_first_batch(name, task, words):
    assert words in refusal(build(name, task), torch.rand(2, 1, 8, 8))


def test_a_network_for_one_size_names_both_sizes():
    network = build("mlp", height=8, width=6)
    assert "8x6" in refusal(network, torch.rand(1, 1, 6, 8))
    assert network(torch.rand(1, 1, 8, 6)).shape == (1, 3)
    what = refusal(build("test_vit"), torch.rand(1, 1, 64, 48))
    assert "160x160" in what
    assert "64x48" in what
    assert build("test_vit", img_size=[64, 48])(torch.rand(1, 1, 64, 48)).shape == (1, 3)
    assert build("test_vit", dynamic_img_size=True)(torch.rand(1, 1, 64, 48)).shape == (1, 3)
    assert "32x32" in refusal(build("torchvision/vit_b_32", image_size=32), torch.rand(1, 1, 64, 64))


def test_a_network_is_the_same_for_the_same_seed():
    for name, task, arguments in SMALL:
        states = []
        for _ in range(2):
            torch.manual_seed(7)
            states.append(build(name, task, **arguments).state_dict())
        assert all(torch.equal(one, states[1][key]) for key, one in states[0].items()), name


@pytest.mark.parametrize(
    ("name", "task", "arguments"),
    [
        ("resnet10t", "multiclass", {"drop_rate": 0.3, "drop_path_rate": 0.2}),
        ("efficientnet_b0", "multiclass", {}),
        ("unet", "segmentation", {"width": 4, "depth": 2}),
        ("smp/Unet", "segmentation", {**LIGHT, "encoder_name": "tu-resnet10t"}),
    ],
)
def test_activation_checkpointing_keeps_less_and_changes_neither_gradients_nor_statistics(
    name, task, arguments
):
    plain = build(name, task, **arguments).train()
    saving = copy.deepcopy(plain)
    checkpoint_activations(saving, name=name)
    images, kept = torch.rand(4, 1, 40, 50), []
    for network in (plain, saving):
        torch.manual_seed(1)
        kept.append(0)

        def count(tensor):
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            logits = network(images)
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    assert kept[1] < 0.8 * kept[0]
    after = saving.state_dict()
    assert all(torch.equal(one, after[key]) for key, one in plain.state_dict().items())
    pairs = zip(plain.parameters(), saving.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs)


@pytest.mark.parametrize(
    ("name", "task", "arguments"),
    [
        ("torchvision/squeezenet1_1", "multiclass", {}),
        ("mlp", "multiclass", {"height": 8, "width": 8}),
        ("smp/Unet", "segmentation", {**LIGHT, "encoder_name": "timm-efficientnet-b0"}),
    ],
)
@pytest.mark.filterwarnings("ignore:`timm-` encoders are deprecated")
def test_a_network_without_activation_checkpointing_says_so(name, task, arguments):
    config = ModelConfig(name=name, arguments=arguments, grad_checkpointing=True)
    what = refusal(apply_options, build(name, task, **arguments), config)
    assert what == f"model.grad_checkpointing: {name!r} has no activation checkpointing"


def test_the_memory_layout_can_be_channels_last():
    network = build("resnet10t")
    apply_options(network, ModelConfig(channels_last=True))
    assert network.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network.eval()(torch.rand(1, 1, 32, 32)).shape == (1, 3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_a_compiled_network_keeps_its_names_and_its_outputs():
    network = build("mlp", height=4, width=4, hidden=[4])
    plain = copy.deepcopy(network)
    apply_options(network, ModelConfig(compile=True))
    assert network.state_dict().keys() == plain.state_dict().keys()
    images = torch.rand(2, 1, 4, 4)
    logits, expected = network(images), plain(images)
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(network.head.weight.grad, plain.head.weight.grad)
