"""Synchronised BatchNorm computes what one process with all samples would; the network stays as it was."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.split_batchnorm import SplitBatchNorm2d

from data_pipeline.fault import UserError
from training.assembly import assemble
from training.command import read_request
from training.gradients import accumulate
from training.networks.build import build_network
from training.networks.synced_batch_norm import SYNCED, synchronise
from training.reading import open_dataset, training_batches
from training.reduction import settle_reduction
from training.state import Progress

PROCESSES, CHANNELS = 3, 5
SHARES = [3, 1, 2]  # samples of each process; those of the last one do not count
LAYERS = {
    "values": (torch.nn.BatchNorm1d, (), {}),
    "lines": (torch.nn.BatchNorm1d, (7,), {"momentum": None}),
    "pictures": (torch.nn.BatchNorm2d, (4, 6), {}),
    "channels last": (torch.nn.BatchNorm2d, (4, 6), {"eps": 0.1}),
    "volumes": (torch.nn.BatchNorm3d, (3, 2, 4), {"affine": False}),
    "no running statistics": (torch.nn.BatchNorm2d, (4, 6), {"track_running_stats": False}),
    "activated": (BatchNormAct2d, (4, 6), {"act_layer": torch.nn.PReLU, "inplace": False}),
}


def layer_of(name):
    kind, _, options = LAYERS[name]
    torch.manual_seed(1)
    layer = kind(CHANNELS, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.1, 1)
    return layer


def features_of(name):
    """Features of all samples, far from zero, and a gradient for each; not where they do not count."""
    _, shape, _ = LAYERS[name]
    torch.manual_seed(2)
    features, slopes = torch.randn(2, sum(SHARES), CHANNELS, *shape)
    features, slopes = 3 * features + 10, slopes.clone()
    if name == "channels last":
        features = features.contiguous(memory_format=torch.channels_last)
    slopes[-SHARES[-1] :] = 0
    return features, slopes


def passed(layer, features, slopes):
    """Outputs, gradient of the features, gradients of the parameters, buffers, after two passes."""
    for _ in range(2):
        layer.zero_grad()
        entered = features.clone().requires_grad_()
        outputs = layer(entered)
        outputs.backward(slopes)
    gradients = {name: one.grad for name, one in layer.named_parameters()}
    return outputs.detach(), entered.grad, gradients, dict(layer.named_buffers())


def compare_layers(accelerator, _root):
    rank = accelerator.process_index
    mine = slice(sum(SHARES[:rank]), sum(SHARES[: rank + 1]))
    counting = slice(0, sum(SHARES[:-1]))
    for name in LAYERS:
        features, slopes = features_of(name)
        expected = passed(layer_of(name), features[counting], slopes[counting])
        layer = torch.nn.Sequential(layer_of(name))
        synchronise(layer).valid = torch.full((SHARES[rank],), rank < PROCESSES - 1)
        outputs, gradient, gradients, buffers = passed(layer, features[mine], slopes[mine])
        if rank < PROCESSES - 1:
            torch.testing.assert_close(outputs, expected[0][mine], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(gradient, expected[1][mine], rtol=1e-5, atol=1e-5)
        else:
            assert bool((gradient == 0).all())
        for path, one in gradients.items():
            dist.all_reduce(one)
            torch.testing.assert_close(one, expected[2][path.removeprefix("0.")], rtol=1e-5, atol=1e-5)
        assert len(buffers) == len(expected[3])
        for path, one in buffers.items():
            torch.testing.assert_close(one, expected[3][path.removeprefix("0.")], rtol=1e-6, atol=1e-6)
    layer = torch.nn.Sequential(layer_of("pictures"))
    synchronise(layer)
    features, _ = features_of("pictures")
    if rank == 0:  # an evaluation talks to nobody
        assert torch.equal(layer.eval()(features), layer_of("pictures").eval()(features))
    layer.train()
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(features[mine].bfloat16())
    assert half.dtype == torch.bfloat16
    mean = features.bfloat16().float().mean(dim=(0, 2, 3)) * 0.1
    torch.testing.assert_close(layer[0].running_mean, mean, rtol=1e-6, atol=1e-6)
    alone = torch.nn.Sequential(layer_of("values"))
    synchronise(alone).valid = torch.tensor([rank == 0])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        alone(torch.ones(1, CHANNELS))


UNET = ["--model.name", "unet", "--model.arguments", "{width: 4, depth: 2}", "--task", "segmentation"]


def job_of(root, accelerator, *words):
    common = ["--data.root", root, "--data.train-transforms", "[{resize_to: {height: 24, width: 24}}]"]
    common += ["--data.workers", "0", "--run-dir", "unused", "--train.sync-batchnorm", "true"]
    request = read_request([*common, *UNET, *words])
    dataset = open_dataset(request.config, learning=True)
    job = assemble(request, accelerator, dataset, checkpoint=None, progress=Progress())
    job.learn()
    return job


def one_step(job):
    """Gradient and buffers after a step that begins as in a run."""
    config, steps = job.config, range(2)
    stream = training_batches(config, job.dataset, job.plan, job.accelerator, steps=range(1))
    settle_reduction(job, next(stream))
    stream = training_batches(config, job.dataset, job.plan, job.accelerator, steps=steps)
    for step in steps:
        job.optimizer.zero_grad(set_to_none=True)
        accumulate(job, stream, step)
    gradient = {name: one.grad.clone() for name, one in job.network.named_parameters()}
    return gradient, dict(job.network.named_buffers())


def compare_runs(accelerator, root):
    """Three micro-batches of 3 + 2 + 2 samples: two processes end on stand-ins; and dice looks twice."""
    words = ["--train.global-batch", "7", "--train.micro-batch", "1", "--loss", "dice"]
    gradient, buffers = one_step(job_of(root, accelerator, *words))
    for name, buffer in buffers.items():
        first = buffer.clone()
        dist.broadcast(first, 0)
        assert torch.equal(buffer, first), name
        assert bool(buffer.isfinite().all())
        assert "num_batches" not in name or buffer == 6
    again, rebuffers = one_step(job_of(root, accelerator, *words, "--model.grad-checkpointing", "true"))
    for name, one in gradient.items():
        torch.testing.assert_close(again[name], one, rtol=1e-5, atol=1e-7)
    for name, one in buffers.items():
        assert torch.equal(rebuffers[name], one), name


THREE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import test_synced_batch_norm as here
from accelerate import Accelerator

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == here.PROCESSES
for compare in (here.compare_layers, here.compare_runs):
    compare(accelerator, sys.argv[2])
accelerator.wait_for_everyone()
"""


@pytest.mark.slow
def test_three_processes_normalise_as_one_with_all_samples_that_count(
    segmentation_dataset, execute, tmp_path
):
    (tmp_path / "three.py").write_text(THREE)
    torchrun = Path(sys.executable).parent / "torchrun"
    here = Path(__file__).parent
    done = execute([torchrun, f"--nproc_per_node={PROCESSES}", "three.py", here, segmentation_dataset])
    assert done.returncode == 0, done.stderr


NETWORKS = {
    "test_resnet": ("multiclass", {}),
    "test_efficientnet": ("multiclass", {}),
    "torchvision/shufflenet_v2_x0_5": ("multiclass", {}),
    "smp/Unet": ("segmentation", {"encoder_name": "mobilenet_v2"}),
    "unet": ("segmentation", {"width": 4}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_stays_what_it_was_for_one_process_and_for_its_files(name):
    task, arguments = NETWORKS[name]
    torch.manual_seed(0)
    network = build_network(name, task=task, channels=3, outputs=3, arguments=arguments)
    plain = copy.deepcopy(network)
    modules = dict(network.named_modules())
    synchronise(network)
    normed = [one for one in network.modules() if type(one) in SYNCED.values()]
    assert len(normed) > 3
    assert dict(network.named_modules()) == modules
    assert list(network.state_dict()) == list(plain.state_dict())
    for kept, one in zip(plain.modules(), network.modules(), strict=True):
        assert isinstance(one, type(kept))
    average = copy.deepcopy(network)
    images = torch.randn(2, 3, 64, 64)
    torch.manual_seed(3)
    expected = plain.train()(images)
    for copied in (network, average):
        torch.manual_seed(3)
        assert torch.equal(copied.train()(images), expected)
    plain.load_state_dict(average.state_dict())


@pytest.mark.parametrize("kind", [SplitBatchNorm2d, torch.nn.SyncBatchNorm, torch.nn.LazyBatchNorm2d])
def test_a_layer_that_computes_something_else_is_refused_by_name(kind):
    layer = kind() if kind is torch.nn.LazyBatchNorm2d else kind(4)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Sequential(layer))
    with pytest.raises(UserError, match=rf"layer 1\.0 is a {kind.__name__}") as refusal:
        synchronise(network)
    assert refusal.value.code == "CONFIG"
    assert "BatchNormAct2d" in refusal.value.mend
