"""However a batch is cut into processes and micro-batches, its loss and gradient are those of the whole."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.config.loss import LossTerms
from training.inputs import Inputs
from training.losses import Labels, build_objective, outputs_of

PROCESSES, MICRO_BATCHES, SAMPLES, FEATURES, CLASSES = 3, 4, 23, 6, 3
OWN = """
import torch

def squares(outputs, targets, *, power):
    return (outputs - targets[:, None]).abs() ** power

class Ratio:
    def __call__(self, outputs, targets, weights):
        there = (targets != 255) * weights[:, None, None]
        return (outputs.abs().mean(dim=1) * there).sum(), (targets * there).sum() + 1 * weights.sum()
"""
TERMS = {
    "classes": ("multiclass", {"cross_entropy": {"label_smoothing": 0.1}, "focal": 0.5}),
    "weighted classes": ("multiclass", {"cross_entropy": {"class_weights": "auto"}}),
    "findings": ("multilabel", {"bce": {"pos_weight": "auto"}, "focal": {"alpha": 0.25}}),
    "pixels": ("segmentation", {"cross_entropy": 1, "dice": {"weight": 0.5, "smooth": 0}}),
    "areas": ("segmentation", {"iou": 1, "tversky": {"alpha": 0.3, "beta": 0.7, "gamma": 0.75}, "focal": 1}),
    "two classes of pixels": ("segmentation", {"bce": 0.5, "dice": 0.5}),
    "own": ("multiclass", {"split_losses:squares": {"power": 3}}),
    "own ratio": ("segmentation", {"split_losses:Ratio": 1}),
}
each = pytest.mark.parametrize("name", list(TERMS))


@pytest.fixture(scope="module", autouse=True)
def _losses_of_the_user(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "split_losses.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def objective_of(name):
    task, terms = TERMS[name]
    spec, classes = LossTerms.model_validate(terms), 2 if name.startswith("two") else CLASSES
    counts = (20, 5, 9)[:classes]
    labels = Labels(task, classes, outputs_of(task, classes, spec), counts, (7, 30, 9)[:classes])
    return build_objective(spec, labels), labels


def batch_of(labels, *, seed, mixed):
    """Pictures are features [B, F] or [B, F, H, W]; some samples, labels and pixels do not count."""
    draw = torch.Generator().manual_seed(seed)
    place = (5, 7) if labels.task == "segmentation" else ()
    shape = {"multiclass": (), "multilabel": (labels.classes,), "segmentation": place}[labels.task]
    kind = {"multiclass": torch.int64, "multilabel": torch.int8, "segmentation": torch.uint8}[labels.task]
    unknown = {"multiclass": 0, "multilabel": -1, "segmentation": 255}[labels.task]
    answers = 2 if labels.task == "multilabel" else labels.classes

    def targets():
        given = torch.randint(0, answers, (SAMPLES, *shape), generator=draw)
        # Quite uneven: the first samples have few known elements, the last nearly all.
        rare = torch.rand(given.shape, generator=draw) > torch.linspace(0.1, 1, SAMPLES).view(
            -1, *(1,) * len(shape)
        )
        return torch.where(rare, unknown, given).to(kind)

    valid = torch.rand(SAMPLES, generator=draw) > 0.1
    share = torch.rand(SAMPLES, generator=draw) if mixed else torch.ones(SAMPLES)
    features = torch.randn((SAMPLES, FEATURES, *place), generator=draw)
    return Inputs(features, targets(), valid, valid.float(), share, targets() if mixed else None)


def piece_of(inputs, rows):
    return Inputs(*(None if one is None else one[rows] for one in inputs))


def network_of(labels, *, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn((labels.outputs, FEATURES), generator=draw).requires_grad_()


def sums_of(objective, network, inputs):
    outputs = torch.einsum("of,bf...->bo...", network, inputs.images)
    return objective.sums(outputs, inputs)


def gradient_of(objective, slopes, network, pieces):
    """Of the pieces of one process, added up as backward passes do."""
    gradient = torch.zeros_like(network)
    for piece in pieces:
        loss = (sums_of(objective, network, piece) * slopes.float()).sum()
        gradient += torch.autograd.grad(loss, network)[0]
    return gradient


def known_before(objective, network, pieces):
    """The sums of the global batch, as far as the gradient needs them."""
    if objective.needs == "nothing":
        return objective.known_counts(int(sum(piece.weights.sum() for piece in pieces)))
    if objective.needs == "targets":
        return sum(objective.counts(piece) for piece in pieces)
    return sum(sums_of(objective, network, piece).detach().double() for piece in pieces)


def agree(value, gradient, whole_value, whole_gradient):
    assert value == pytest.approx(whole_value, rel=1e-6)
    assert (gradient - whole_gradient).abs().max() <= 1e-6 * whole_gradient.abs().max()


def whole_of(objective, network, inputs):
    total = sums_of(objective, network, inputs).detach().double()
    return objective.value(total).item(), gradient_of(objective, objective.slopes(total), network, [inputs])


@each
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    mixed=st.booleans(),
    cuts=st.sets(st.integers(1, SAMPLES - 1), min_size=11, max_size=11),
)
def test_three_uneven_processes_of_four_micro_batches_are_the_whole_batch(name, seed, mixed, cuts):
    objective, labels = objective_of(name)
    inputs = batch_of(labels, seed=seed, mixed=mixed)
    network = network_of(labels, seed=seed + 1)
    edges = [0, *sorted(cuts), SAMPLES]
    pieces = [piece_of(inputs, slice(*edge)) for edge in pairwise(edges)]
    assert len(pieces) == PROCESSES * MICRO_BATCHES
    slopes = objective.slopes(known_before(objective, network, pieces))
    processes = [pieces[first : first + MICRO_BATCHES] for first in range(0, len(pieces), MICRO_BATCHES)]
    gradient = sum(gradient_of(objective, slopes, network, process) for process in processes)
    total = sum(sums_of(objective, network, piece).detach().double() for piece in pieces)
    agree(objective.value(total).item(), gradient, *whole_of(objective, network, inputs))


@each
@settings(deadline=None, max_examples=10)
@given(order=st.permutations(range(SAMPLES)))
def test_the_order_of_the_samples_changes_nothing(name, order):
    objective, labels = objective_of(name)
    inputs = batch_of(labels, seed=1, mixed=True)
    network = network_of(labels, seed=2)
    agree(*whole_of(objective, network, piece_of(inputs, list(order))), *whole_of(objective, network, inputs))


@each
def test_samples_that_are_not_valid_are_as_if_they_were_not_there(name):
    objective, labels = objective_of(name)
    inputs = batch_of(labels, seed=3, mixed=True)
    network = network_of(labels, seed=4)
    garbage = inputs.images.clone()
    garbage[~inputs.valid] = 1e30
    assert not inputs.valid.all()
    there = piece_of(inputs, inputs.valid)
    agree(
        *whole_of(objective, network, inputs._replace(images=garbage)), *whole_of(objective, network, there)
    )


@each
def test_the_mean_of_the_means_would_be_another_loss(name):
    """Else the other tests would show nothing."""
    objective, labels = objective_of(name)
    inputs = batch_of(labels, seed=5, mixed=False)
    network = network_of(labels, seed=6)
    rows = [slice(0, 5), slice(5, 12), slice(12, SAMPLES)]
    means = [whole_of(objective, network, piece_of(inputs, one))[0] for one in rows]
    whole, _ = whole_of(objective, network, inputs)
    assert not math.isclose(sum(means) / 3, whole, rel_tol=1e-4)


EDGES = [0, 1, 3, 4, 6, 7, 8, 12, 13, 14, 18, 22, SAMPLES]
THREE = """
import json, sys
from itertools import pairwise
from pathlib import Path
import torch.distributed as dist
sys.path.append(sys.argv[1])
import test_losses_split as here

dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
for name in here.TERMS:
    objective, labels = here.objective_of(name)
    inputs = here.batch_of(labels, seed=7, mixed=True)
    network = here.network_of(labels, seed=8)
    edges = list(pairwise(here.EDGES))[rank * here.MICRO_BATCHES :][: here.MICRO_BATCHES]
    pieces = [here.piece_of(inputs, slice(*edge)) for edge in edges]
    known = here.known_before(objective, network, pieces)
    dist.all_reduce(known)
    gradient = here.gradient_of(objective, objective.slopes(known), network, pieces)
    dist.all_reduce(gradient)
    total = sum(here.sums_of(objective, network, piece).detach().double() for piece in pieces)
    dist.all_reduce(total)
    found[name] = [objective.value(total).item(), gradient.tolist()]
Path(f"found-{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_three_real_processes_find_the_loss_and_the_gradient_of_the_whole_batch(execute, tmp_path):
    (tmp_path / "three.py").write_text(THREE)
    (tmp_path / "split_losses.py").write_text(OWN)
    torchrun = Path(sys.executable).parent / "torchrun"
    done = execute([torchrun, "--nproc_per_node=3", "three.py", Path(__file__).parent])
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(PROCESSES)]
    assert found[0] == found[1] == found[2]
    assert found[0].keys() == TERMS.keys()
    for name, (value, gradient) in found[0].items():
        objective, labels = objective_of(name)
        inputs, network = batch_of(labels, seed=7, mixed=True), network_of(labels, seed=8)
        agree(value, torch.tensor(gradient), *whole_of(objective, network, inputs))
