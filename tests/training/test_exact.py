"""Exact mode: one order of addition on any number of processes, statistics in it, and what is refused."""

from __future__ import annotations

import copy
import inspect
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from data_pipeline.fault import UserError
from training.assembly import assemble
from training.command import read_request
from training.exact import machine
from training.exact.conditions import check_processes
from training.exact.flat_gradients import FlatGradients
from training.exact.grains import accumulate_grains, own_grains
from training.exact.running_statistics import RunningStatistics, learning_norms, own_statistics
from training.exact.sum_tree import landings, odd_part, process_counts
from training.inputs import forward
from training.micro_batch import seed_dropout
from training.reading import open_dataset, training_batches
from training.state import Progress

GRAINS = range(1, 65)
SIZE = "[{resize_to: {height: 32, width: 32}}]"
RESNET = ["--model.name", "test_resnet", "--model.arguments", "{drop_rate: 0.3, drop_path_rate: 0.2}"]
UNET = ["--model.name", "unet", "--model.arguments", "{width: 4, depth: 2}"]
CASES = {
    "classes": ["photo_dataset", *RESNET, "--data.mixup", "1"],
    "labels": ["multilabel_dataset", "--task", "multilabel", *RESNET],
    "areas": [
        *("segmentation_dataset", "--task", "segmentation", *UNET, "--loss", "{bce: 0.5, dice: 0.5}"),
        *("--model.grad-checkpointing", "true"),
    ],
}


def added_by_halves(parts, add):
    """The tree as it is told: halves while their number is even, then one after the other."""
    if len(parts) % 2 == 0:
        half = len(parts) // 2
        return add(added_by_halves(parts[:half], add), added_by_halves(parts[half:], add))
    total = parts[0]
    for part in parts[1:]:
        total = add(total, part)
    return total


def in_words(left, right):
    return f"({left}+{right})"


def landed(names):
    """What the landings make of grains with names, written as a sum."""
    stack = {}
    for name, landing in zip(names, landings(len(names)), strict=True):
        stack[landing.buffer] = name if landing.fresh else in_words(stack[landing.buffer], name)
        for top in range(landing.buffer, landing.buffer - landing.merges, -1):
            stack[top - 1] = in_words(stack[top - 1], stack.pop(top))
    assert list(stack) == [0]
    return stack[0]


def test_every_allowed_number_of_processes_adds_up_the_same_tree():
    for grains in GRAINS:
        names = [str(number) for number in range(grains)]
        assert process_counts(grains)[-1] * odd_part(grains) == grains
        for processes in process_counts(grains):
            own = grains // processes
            shares = [landed(names[first : first + own]) for first in range(0, grains, own)]
            assert added_by_halves(shares, in_words) == added_by_halves(names, in_words), (grains, processes)


def test_a_process_needs_no_more_buffers_than_the_tree_has_levels():
    for grains in GRAINS:
        levels = (grains // odd_part(grains)).bit_length()
        assert 1 + max(landing.buffer for landing in landings(grains)) <= levels


def parameters():
    """Of several layouts, none of them as long as a cache line."""
    shapes = {"matrix": (3, 5), "vector": (7,), "scalar": (), "kernels": (4, 3, 2, 2)}
    made = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    made["kernels"] = torch.nn.Parameter(made["kernels"].detach().to(memory_format=torch.channels_last))
    return made


def gradient_of(grain, like):
    """Numbers of very different sizes, whose sum depends on the order."""
    generator = torch.Generator().manual_seed(grain)
    small, size = torch.randn((2, *like.shape), generator=generator)
    return torch.empty_like(like).copy_(small * torch.exp2(6 * size))


def test_the_sum_of_the_grains_is_that_of_the_tree_bit_for_bit():
    differs = 0
    for grains in GRAINS:
        own = parameters()
        sums = FlatGradients(own, grains=grains, processes=1)
        for step in range(2):
            for grain in range(grains):
                for one in own.values():
                    one.grad = gradient_of(grain + step, one)
                sums.take(grain)
            sums.give()
            for one in own.values():
                parts = [gradient_of(grain + step, one) for grain in range(grains)]
                assert torch.equal(one.grad, added_by_halves(parts, torch.add)), grains
                assert one.grad.stride() == one.stride()
                differs += not torch.equal(one.grad, sum(parts))
    assert differs > 100, "another order gives other bits, so this test can fail"


class Normalised(torch.nn.Module):
    """Every kind of running statistics: with momentum, without, of instances, called twice, not at all."""

    def __init__(self):
        super().__init__()
        self.usual = torch.nn.BatchNorm2d(3)
        self.mean = torch.nn.BatchNorm2d(3, momentum=None)
        self.instance = torch.nn.InstanceNorm2d(3, track_running_stats=True, momentum=0.3)
        self.frozen = torch.nn.BatchNorm2d(3).eval()
        self.idle = torch.nn.BatchNorm2d(3)

    def forward(self, images):
        return self.frozen(self.instance(self.mean(self.usual(images))))


def grain_images():
    generators = [torch.Generator().manual_seed(grain) for grain in range(8)]
    return [torch.randn(4, 3, 5, 5, generator=one) * (n + 1) for n, one in enumerate(generators)]


GRAIN_IMAGES = grain_images()


def test_running_statistics_advance_as_if_one_process_met_the_grains_in_their_order():
    network, expected = Normalised(), Normalised()
    norms = learning_norms(network)
    assert list(norms) == ["usual", "mean", "instance", "idle"]
    calls = {network.usual: 1, network.mean: 1, network.instance: 0}
    statistics = RunningStatistics(calls, grains=8, processes=1)
    for _ in range(3):
        statistics.begin()
        with statistics.own():
            for grain, images in enumerate(GRAIN_IMAGES):
                network(images)
                statistics.take(grain)
                expected(images)
        statistics.advance()
    assert network.usual.momentum == 0.1
    assert network.mean.momentum is None
    assert int(network.mean.num_batches_tracked) == 24
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(network.get_buffer(name), buffer, rtol=1e-5, atol=1e-6, msg=name)


def test_a_pass_of_its_own_forgets_what_was_there_before():
    norm = torch.nn.BatchNorm2d(3)
    fresh = copy.deepcopy(norm)
    norm(GRAIN_IMAGES[7])
    with own_statistics([norm, fresh]):
        norm(GRAIN_IMAGES[0])
        fresh(GRAIN_IMAGES[0])
    assert torch.equal(norm.running_var, fresh.running_var)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def job_of(root, accelerator, *words):
    common = ["--data.train-transforms", SIZE, "--data.workers", "0", "--train.global-batch", "12"]
    exact = ["--train.exact", "true", "--train.grain", "2", "--run-dir", "unused", "--data.root", str(root)]
    request = read_request([*exact, *common, *words])
    dataset = open_dataset(request.config, learning=True)
    job = assemble(request, accelerator, dataset, checkpoint=None, progress=Progress())
    job.learn()
    return job


def stream_of(job, steps=range(1)):
    return training_batches(job.config, job.dataset, job.plan, job.accelerator, steps=steps)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_loss_of_all_grains_together(case, accelerator, request):
    fixture, *words = CASES[case]
    root = request.getfixturevalue(fixture)
    found, plain = (job_of(root, accelerator, *words) for _ in range(2))
    share = accumulate_grains(found, stream_of(found), 0)

    # One graph over all grains, one backward pass; running statistics advance by themselves.
    objective, sums = plain.task.objective, []
    for grain, batch in enumerate(stream_of(plain)):
        seed_dropout(plain, 0, f"grain {grain}")
        inputs = plain.normalizer.normalised(plain.normalizer.kept(batch))
        sums.append(objective.sums(forward(plain.network, inputs.images), inputs).double())
    assert len(sums) == len(own_grains(plain)) == 6
    objective.value(torch.stack(sums).sum(dim=0)).backward()

    expected = dict(plain.network.named_parameters())
    error = sum(
        float((one.grad - expected[n].grad).norm() ** 2) for n, one in found.network.named_parameters()
    )
    size = sum(float(one.grad.norm() ** 2) for one in expected.values())
    assert (error / size) ** 0.5 < 1e-6
    torch.testing.assert_close(share.sums, torch.stack(sums).detach(), rtol=1e-6, atol=1e-6)
    for name, buffer in plain.network.named_buffers():
        torch.testing.assert_close(found.network.get_buffer(name), buffer, rtol=1e-5, atol=1e-6, msg=name)


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.code in ("CONFIG", "RESUME")
    for word in words:
        assert word in f"{caught.value.what} {caught.value.mend}", (caught.value.what, caught.value.mend)


@pytest.mark.parametrize("processes", [3, 8])
def test_a_number_of_processes_that_would_add_up_otherwise_is_refused(processes):
    words = [
        "--train.exact",
        "true",
        "--train.global-batch",
        "24",
        "--train.grain",
        "2",
        "--run-dir",
        "unused",
    ]
    config = read_request(words).config
    for allowed in (1, 2, 4):
        check_processes(config, allowed)
    finer = ["--train.grain 3"] if processes == 8 else []
    refused(
        lambda: check_processes(config, processes),
        f"{processes} processes",
        "start 1, 2 or 4 processes",
        *finer,
    )


class Remembering(torch.nn.Module):
    """Adds a running mean of what it has seen, which is no normalisation's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images):
        if self.training:
            self.seen.lerp_(images.detach().mean(), 0.1)
        return images


class Caching(torch.nn.Module):
    """Makes a table in its first pass and keeps it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", None)

    def forward(self, images):
        if self.table is None:
            self.table = torch.arange(float(images.shape[-1]))
        return images + 0 * self.table


class Moody(torch.nn.Module):
    """Leaves a layer out in every third pass, as some do by chance."""

    def __init__(self):
        super().__init__()
        self.bias, self.passes = torch.nn.Parameter(torch.zeros(())), 0

    def forward(self, images):
        self.passes += 1
        return images if self.passes % 3 == 0 else images + self.bias


class Unordered(torch.nn.Module):
    """Uses an operation of which torch says that it adds up in no fixed order, on a CPU too."""

    def forward(self, images):
        return images + images.new_zeros(4).put_(torch.tensor([0]), images.new_zeros(1)).sum()


def take_with(module, root, accelerator):
    job = job_of(root, accelerator, *RESNET)
    job.network.conv1 = torch.nn.Sequential(module, job.network.conv1)
    return accumulate_grains(job, stream_of(job), 0)


def test_a_network_that_keeps_something_else_is_refused_by_name(photo_dataset, accelerator):
    refused(lambda: take_with(Remembering(), photo_dataset, accelerator), "conv1.0.seen")
    assert take_with(Caching(), photo_dataset, accelerator)


def test_a_network_that_leaves_out_layers_by_chance_is_refused_by_name(photo_dataset, accelerator):
    refused(lambda: take_with(Moody(), photo_dataset, accelerator), "conv1.0.bias", "not in others")


def test_an_operation_without_a_fixed_order_is_refused_by_name(photo_dataset, accelerator):
    torch.use_deterministic_algorithms(True)
    try:
        refused(lambda: take_with(Unordered(), photo_dataset, accelerator), "put_")
    finally:
        torch.use_deterministic_algorithms(False)


def test_batch_norm_that_would_see_one_value_is_told_to_raise_the_grain(photo_dataset, accelerator):
    words = ["--model.name", "resnet10t", "--train.grain", "1", "--data.train-transforms"]
    job = job_of(photo_dataset, accelerator, *words, "[{resize_to: {height: 16, width: 16}}]")
    refused(lambda: accumulate_grains(job, stream_of(job), 0), "--train.grain", "BatchNorm")


def test_a_parameter_that_no_pass_uses_is_left_without_a_gradient(photo_dataset, accelerator):
    job = job_of(photo_dataset, accelerator, *RESNET)
    job.network.spare = torch.nn.Linear(2, 2)
    accumulate_grains(job, stream_of(job), 0)
    without = [name for name, one in job.network.named_parameters() if one.grad is None]
    assert without == ["spare.weight", "spare.bias"]


HERE = machine.machine_facts(torch.device("cpu"))


@pytest.mark.parametrize(("name", "mend"), [("threads", "OMP_NUM_THREADS=99"), ("device", ""), ("torch", "")])
def test_another_machine_than_that_of_the_checkpoint_is_refused_or_said(name, mend):
    before = {**HERE, "processes": 4, name: 99}
    refused(
        lambda: machine.check_machine(before, HERE, exact=True, allowed=False),
        f"{name} was 99, is {HERE[name]}",
        "--allow-config-change",
        mend,
    )
    assert len(machine.check_machine(before, HERE, exact=True, allowed=True)) == 1
    assert len(machine.check_machine(before, HERE, exact=False, allowed=False)) == (name != "threads")
    assert machine.check_machine({**HERE, "processes": 4}, HERE, exact=True, allowed=False) == []
    refused(lambda: machine.check_alike([HERE, HERE, {**HERE, name: 99}]), "process 2", name)
    machine.check_alike([HERE, HERE])


def test_the_threads_of_a_gpus_host_do_not_matter():
    gpu = {**HERE, "device": "cuda: one"}
    assert machine.check_machine({**gpu, "threads": 99}, gpu, exact=True, allowed=False) == []


PROCESSES = """
import torch, torch.distributed as dist
from training.exact.flat_gradients import FlatGradients
from training.exact.running_statistics import RunningStatistics

{shared}
GRAIN_IMAGES = grain_images()
dist.init_process_group("gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
for grains in (4, 8, 12, 24, 64):
    own, size = parameters(), grains // processes
    sums = FlatGradients(own, grains=size, processes=processes)
    for grain in range(size):
        for one in own.values():
            one.grad = gradient_of(rank * size + grain, one)
        sums.take(grain)
    sums.give()
    for one in own.values():
        parts = [gradient_of(grain, one) for grain in range(grains)]
        assert torch.equal(one.grad, added_by_halves(parts, torch.add)), grains

def advanced(processes, rank):
    torch.manual_seed(0)
    network = Normalised()
    calls = {{network.usual: 1, network.mean: 1, network.instance: 0}}
    statistics = RunningStatistics(calls, grains=8, processes=processes)
    for _ in range(3):
        statistics.begin()
        with statistics.own():
            for grain in range(8 // processes):
                network(GRAIN_IMAGES[rank * 8 // processes + grain])
                statistics.take(grain)
        under_way = statistics.send()
        if under_way is not None:
            under_way.wait()
        statistics.advance()
    return network.state_dict()

alone, together = advanced(1, 0), advanced(processes, rank)
for name, one in alone.items():
    assert torch.equal(one, together[name]), name
dist.barrier()
dist.destroy_process_group()
if rank == 0:
    print("equal")
"""


@pytest.mark.slow
def test_four_processes_have_the_bits_of_one(execute, tmp_path):
    shared = map(inspect.getsource, (parameters, gradient_of, added_by_halves, grain_images, Normalised))
    (tmp_path / "equal.py").write_text(PROCESSES.format(shared="\n".join(shared)))
    done = execute([Path(sys.executable).parent / "torchrun", "--nproc_per_node=4", "equal.py"])
    assert done.stdout.strip() == "equal", done.stderr
