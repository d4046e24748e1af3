"""Weights from files and from hubs' caches: what is loaded, renamed, adapted, skipped and refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from safetensors.torch import save_file

from data_pipeline.fault import UserError
from training.networks.build import build_network, head_names
from training.networks.pretrained import load_pretrained

UNET = {"encoder_name": "resnet18", "decoder_channels": [16, 8, 8, 4, 4]}
HEAD = {"fc.weight", "fc.bias"}


class Asked:
    """One network of five outputs, freshly built, and what loading into it gives."""

    def __init__(self, name, task="multiclass", channels=3, **arguments):
        self.name = name
        self.asked = {"task": task, "channels": channels, "outputs": 5, "arguments": arguments}
        torch.manual_seed(1)
        self.network = build_network(name, **self.asked)
        self.start = {key: value.clone() for key, value in self.network.state_dict().items()}
        self.head = head_names(name, **self.asked)

    def load(self, source):
        return load_pretrained(self.network, source, name=self.name, head=self.head, **self.asked)

    def refused(self, source, code="CONFIG"):
        """The message; and nothing was loaded."""
        with pytest.raises(UserError) as caught:
            self.load(source)
        assert (caught.value.code, bool(caught.value.mend)) == (code, True)
        assert self.changed() == set()
        return caught.value.what

    def changed(self):
        now = self.network.state_dict()
        return {key for key, value in self.start.items() if not torch.equal(value, now[key])}

    def equal(self, names, tensors):
        now = self.network.state_dict()
        return all(torch.equal(now[name], tensors[name]) for name in names)


@pytest.fixture(scope="module")
def published():
    """A state dict as torchvision publishes it, of 1000 classes, each number different from any fresh one."""
    torch.manual_seed(2)
    state = torchvision.models.resnet18().state_dict()
    return {name: value + 1 if value.is_floating_point() else value + 7 for name, value in state.items()}


@pytest.fixture
def saved(tmp_path):
    """`saved(content, name)`: a file of torch's, or of safetensors, and its path."""

    def save(content, name="weights.pth"):
        path = tmp_path / name
        (save_file if name.endswith(".safetensors") else torch.save)(content, path)
        return str(path)

    return save


@pytest.mark.parametrize("name", ["torchvision/resnet18", "resnet18"])
@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors", "weights.pth.tar"])
def test_a_torchvision_file_of_1000_classes_loads_into_five(name, file, published, saved):
    case = Asked(name)
    generator = torch.get_rng_state()
    report = case.load(saved(published, file))
    assert torch.equal(torch.get_rng_state(), generator)
    assert case.changed() == set(published) - HEAD
    assert case.equal(set(published) - HEAD, published)
    assert (report.loaded, report.tensors) == (120, 122)
    assert report.parameters == sum(one.numel() for one in case.network.parameters()) - 5 * 512 - 5
    first, *rest = report.lines()
    assert first.startswith("loaded 120 of 122 tensors (11.2 M parameters) from '")
    assert first.endswith(f"{file}'")
    assert rest == [
        "skipped fc.weight: [1000, 512] in the file, [5, 512] here",
        "skipped fc.bias: [1000] in the file, [5] here",
    ]


def test_a_head_that_fits_is_loaded_too(saved):
    case, state = Asked("test_resnet"), timm.create_model("test_resnet", num_classes=5).state_dict()
    report = case.load(saved(state))
    assert case.equal(state, state)
    assert report.loaded == report.tensors
    assert len(report.lines()) == 1


def test_a_file_without_a_head_or_without_counters_loads(published, saved):
    case = Asked("torchvision/resnet18")
    body = {name: value for name, value in published.items() if name not in HEAD and "num_b" not in name}
    report = case.load(saved(body))
    assert case.changed() == body.keys()
    assert report.lines()[1:] == [
        "skipped fc.weight: not in the file, [5, 512] here",
        "skipped fc.bias: not in the file, [5] here",
    ]


@pytest.mark.parametrize(
    "wrapper", [(), ("state_dict",), ("model",), ("model_state_dict",), ("network", "model")]
)
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.backbone.", "encoder."]
)
def test_wrappers_around_and_prefixes_before_the_names_come_off(wrapper, prefix, saved):
    case = Asked("test_resnet")
    state = {name: value + 1 for name, value in case.start.items()}
    content = {prefix + name: value for name, value in state.items()} | {"other.weight": torch.ones(2)}
    for name in reversed(wrapper):
        content = {name: content, "epoch": 3, "optimizer": {"state": {}, "lr": 0.1}}
    report = case.load(saved(content))
    assert case.equal(state, state)
    assert report.unknown == ("other.weight",)
    assert report.lines()[0].endswith(f", names with '{prefix}' taken off" if prefix else "weights.pth'")
    assert report.lines()[1:] == ["in the file only: other.weight"]


def test_a_classifiers_file_loads_into_a_segmentation_networks_encoder(published, saved):
    case = Asked("smp/Unet", "segmentation", **UNET)
    report = case.load(saved(published))
    assert case.changed() == {f"encoder.{name}" for name in published.keys() - HEAD}
    assert report.renamed == "'encoder.' put before"
    outside = [name for name in case.start if not name.startswith("encoder.")]
    assert report.skipped == (f"{len(outside)} tensors outside 'encoder.': none in the file",)
    assert set(report.unknown) == HEAD
    whole = Asked("smp/Unet", "segmentation", **UNET)
    whole.load(saved({name: value + 1 for name, value in whole.start.items()}, "whole.safetensors"))
    assert whole.changed() == set(whole.start)


@pytest.mark.parametrize("encoder", ["test_resnet", "test_convnext"])
def test_a_timm_file_loads_into_an_encoder_of_timms(encoder, saved):
    state = {name: value + 1 for name, value in timm.create_model(encoder).state_dict().items()}
    case = Asked("smp/FPN", "segmentation", encoder_name=f"tu-{encoder}", encoder_depth=4)
    report = case.load(saved(state))
    inside = {name for name in case.start if name.startswith("encoder.")}
    assert case.changed() == inside
    assert report.loaded == len(inside) > 10


def test_an_encoder_of_a_segmentation_network_loads_into_a_classifier(saved):
    state = {name: value + 1 for name, value in Asked("smp/Unet", "segmentation", **UNET).start.items()}
    case = Asked("torchvision/resnet18")
    report = case.load(saved(state))
    assert case.changed() == set(case.start) - HEAD
    assert report.renamed == "'encoder.' taken off"
    assert report.unknown
    assert report.lines()[-1].endswith(f"… and {len(report.unknown) - 6} more")


@pytest.mark.parametrize("channels", [1, 4])
def test_the_first_convolution_is_carried_to_other_channels(channels, published, saved):
    case = Asked("torchvision/resnet18", channels=channels)
    report = case.load(saved(published))
    there = f"conv1.weight: [64, 3, 7, 7] in the file, [64, {channels}, 7, 7] here"
    assert report.adapted == (there,)
    grey = torch.rand(1, 1, 32, 32)
    reference = torch.nn.functional.conv2d(grey.expand(1, 3, 32, 32), published["conv1.weight"], stride=2)
    mine = torch.nn.functional.conv2d(
        grey.expand(1, channels, 32, 32), case.network.conv1.weight.detach(), stride=2
    )
    if channels == 1:
        torch.testing.assert_close(mine, reference)
    else:
        assert torch.allclose(case.network.conv1.weight[:, 3], published["conv1.weight"][:, 0] * 3 / 4)


def test_filters_for_grey_pictures_give_on_colour_what_they_gave_on_grey(saved):
    state = {name: value + 1 for name, value in Asked("test_resnet", channels=1).start.items()}
    case = Asked("test_resnet")
    assert len(case.load(saved(state)).adapted) == 1
    assert torch.allclose(case.network.conv1[0].weight.sum(1), state["conv1.0.weight"][:, 0])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_formats_are_converted_and_reported(kind, published, saved):
    case = Asked("torchvision/resnet18")
    state = {
        name: value.to(kind) if value.is_floating_point() else value for name, value in published.items()
    }
    report = case.load(saved(state))
    assert case.equal(
        state.keys() - HEAD,
        {name: value.float() for name, value in state.items()}
        | {name: value for name, value in state.items() if not value.is_floating_point()},
    )
    word = str(kind).removeprefix("torch.")
    assert report.lines()[-1] == f"converted {len(report.converted)} tensors from {word} to float32"
    assert len(report.converted) == 100


def test_a_wrong_file_is_refused_with_every_mismatch_and_nothing_is_loaded(published, saved):
    wrong = dict(published)
    wrong["layer1.0.conv1.weight"] = torch.zeros(64, 64, 5, 5)
    wrong["bn1.running_mean"] = torch.zeros(64, dtype=torch.int64)
    del wrong["layer4.1.bn2.bias"]
    what = Asked("torchvision/resnet18").refused(saved(wrong)).splitlines()
    assert what[0].endswith("does not fit 'torchvision/resnet18': 3 of 122 tensors differ")
    assert what[1:] == [
        "bn1.running_mean: int64 in the file, float32 here",
        "layer1.0.conv1.weight: [64, 64, 5, 5] in the file, [64, 64, 3, 3] here",
        "layer4.1.bn2.bias: not in the file, [512] here",
    ]


def test_a_file_of_another_network_is_refused_in_about_fifty_lines(published, saved):
    what = Asked("torchvision/resnet50").refused(saved(published)).splitlines()
    assert "layer1.0.conv1.weight: [64, 64, 3, 3] in the file, [64, 64, 1, 1] here" in what
    assert len(what) == 52
    count = int(what[0].split(": ")[-1].split()[0])
    assert what[-1] == f"… and {count - 50} more"
    assert what[1:-1] == sorted(what[1:-1])
    what = Asked("test_vit").refused(saved(published)).splitlines()
    assert "it is for another network, with tensors such as conv1.weight, bn1.weight" in what[0]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e300])
def test_numbers_that_are_not_finite_are_refused(number, published, saved):
    broken = published["layer2.0.bn1.weight"].double()
    broken[3] = number
    what = Asked("torchvision/resnet18").refused(saved({**published, "layer2.0.bn1.weight": broken}))
    assert "not finite, in 1 of 122 tensors\nlayer2.0.bn1.weight" in what


class Harm:
    """Pickled, it writes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_and_does_not(zipped, published, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "weights.pth"
    content = {"state_dict": published, "other": Harm(canary)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    what = Asked("torchvision/resnet18").refused(str(path), code="UNSAFE")
    assert "holds more than tensors (" in what
    assert "open)" in what
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists(), "the file would have done it"


def test_a_whole_pickled_network_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    assert "holds more than tensors" in Asked("test_resnet").refused(
        str(tmp_path / "whole.pt"), code="UNSAFE"
    )
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "traced.pt")
    assert "holds more than tensors" in Asked("test_resnet").refused(
        str(tmp_path / "traced.pt"), code="UNSAFE"
    )


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors", "text.pth", "text.safetensors", "empty.bin"])
def test_a_damaged_file_is_refused(name, published, saved, tmp_path):
    path = Path(saved(published, name))
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[: len(whole) // 2], "text": b"<html>Not found</html>", "empty": b""}[path.stem]
    )
    assert f"cannot read '{path}'" in Asked("test_resnet").refused(str(path))


def test_what_is_no_file_of_weights_is_refused(saved, tmp_path):
    case = Asked("test_resnet")
    assert "there is no file" in case.refused(str(tmp_path / "absent.pth"))
    assert "there is no file" in case.refused(str(tmp_path))
    (tmp_path / "weights.npz").touch()
    assert "is neither .safetensors nor .pth" in case.refused(str(tmp_path / "weights.npz"))
    assert "holds no named tensors" in case.refused(saved({"epoch": 3}))
    assert "holds no named tensors" in case.refused(saved([torch.ones(2)]))


@pytest.mark.parametrize(
    ("name", "task"), [("unet", "segmentation"), ("mlp", "multiclass"), ("test_vit4", "multiclass")]
)
def test_networks_that_nobody_published_weights_of_say_so(name, task):
    arguments = {"unet": {"width": 2}, "mlp": {"height": 4, "width": 4}}.get(name, {})
    assert "there are no published weights of" in Asked(name, task, **arguments).refused(True)


def test_published_weights_of_torchvision_come_out_of_its_cache(published, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    (tmp_path / "checkpoints").mkdir()
    torch.save(published, tmp_path / "checkpoints" / weights.url.rpartition("/")[2])
    case = Asked("torchvision/resnet18", channels=1)
    generator = torch.get_rng_state()
    report = case.load(True)
    assert torch.equal(torch.get_rng_state(), generator)
    assert case.changed() == set(published) - HEAD
    assert report.origin == "ResNet18_Weights.IMAGENET1K_V1 of torchvision"
    assert report.adapted == ("conv1.weight: [64, 3, 7, 7] in the file, [64, 1, 7, 7] here",)


def plant(home, repository, revision, state, config):
    """A file as it lies in the cache of the Hugging Face hub after a download."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    save_file(state, snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps(config))


HUB = """
import json, sys, torch
from training.networks.build import build_network, head_names
from training.networks.pretrained import load_pretrained
from data_pipeline.fault import UserError
for name, task, channels, arguments in json.loads(sys.argv[1]):
    asked = {"task": task, "channels": channels, "outputs": 5, "arguments": arguments}
    try:
        network, head = build_network(name, **asked), head_names(name, **asked)
        report = load_pretrained(network, True, name=name, head=head, **asked)
        print(json.dumps([report.loaded, report.lines()]))
    except UserError as error:
        print(json.dumps([error.code, error.what]))
"""


def test_published_weights_of_timm_and_smp_come_out_of_the_hubs_cache(published, script, tmp_path):
    vit = {name: value + 1 for name, value in timm.create_model("test_vit").state_dict().items()}
    hub = tmp_path / "hf"
    config = {
        "architecture": "test_vit",
        "num_classes": 1000,
        "pretrained_cfg": {"input_size": [3, 160, 160]},
    }
    plant(hub, timm.get_pretrained_cfg("test_vit").hf_hub_id.rstrip("/"), "a" * 40, vit, config)
    plant(hub, "me/mine", "b" * 40, vit, config)
    encoder = {name: value for name, value in published.items() if name not in HEAD}
    settings = smp.encoders.encoders["resnet18"]["pretrained_settings"]["imagenet"]
    plant(hub, settings["repo_id"], settings["revision"], encoder, {})
    asked = [
        ["test_vit", "multiclass", 1, {}],
        ["hf-hub:me/mine", "multiclass", 3, {}],
        ["smp/Unet", "segmentation", 1, UNET],
        ["test_resnet", "multiclass", 3, {}],
    ]
    env = {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]}
    done = script(HUB, json.dumps(asked), env=env)
    assert done.returncode == 0, done.stderr
    here, mine, unet, absent = (json.loads(line) for line in done.stdout.splitlines())
    assert here[0] == mine[0] == len(vit) - 2
    assert here[1][0].endswith(" of timm")
    assert "adapted patch_embed.proj.weight: for 3 channels at the hub, 1 here" in here[1]
    assert "skipped head.weight: [1000, 64] in the file, [5, 64] here" in mine[1]
    assert mine[1][0].endswith("hf-hub:me/mine of timm")
    assert unet[0] == len(encoder)
    assert "adapted encoder.conv1.weight: for 3 channels at the hub, 1 here" in unet[1]
    assert absent[0] == "CONFIG"
    assert absent[1].startswith("model.pretrained: cannot get the weights of 'test_resnet': ")
