"""The gradient of a global batch is that of one process with all of it: every loss, topologies at random.

The draws come from fixed seeds, so a case that fails is there again. What is expected comes from one forward
and one backward pass over the whole batch, without any of our own arithmetic but that of the loss.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from data_pipeline.items import SourceOptions
from data_pipeline.pack import pack
from data_pipeline.plan import Work
from data_pipeline.read import ShardReader
from data_pipeline.sources import find_source
from data_pipeline.store import Folder
from training.assembly import assemble
from training.command import read_request
from training.gradients import accumulate
from training.inputs import Normalizer
from training.losses import LOSSES as KNOWN
from training.reading import batches, make_plan, open_dataset, training_batches
from training.state import Progress

HERE, SIDE, SAMPLES = Path(__file__).parent, 16, 24
LABELS = ("first", "second", "third")
TASKS = {"classes": "multiclass", "labels": "multilabel", "pixels": "segmentation", "two": "segmentation"}

OWN_LOSSES = """
from torch.nn import functional as F

def per_sample(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none") ** 2

def per_label(outputs, targets):
    return (outputs.tanh() - targets) ** 2

def per_pixel(outputs, targets):
    return (outputs.tanh() - targets[:, None] % 3) ** 2

def weighted(outputs, targets, weights):
    each = outputs.sigmoid().flatten(1).mean(dim=1) ** 2
    return (each * weights).sum(), weights.sum() * 2
"""
LOSSES = {
    "classes": [
        "cross_entropy",
        "{cross_entropy: {class_weights: [1, 2, 0.25], label_smoothing: 0.1}}",
        "{cross_entropy: {class_weights: auto, weight: 0.3}, focal: {gamma: 0.5, weight: 2}}",
        "{focal: {gamma: 3}}",
        "{'grid_losses:per_sample': 0.5, cross_entropy: 1}",
        "grid_losses:weighted",
    ],
    "labels": [
        "bce",
        "{bce: {pos_weight: [1, 3, 0.5], label_smoothing: 0.2}}",
        "{bce: {weight: 0.7, pos_weight: auto}, focal: {weight: 0.3, alpha: 0.25}}",
        "{focal: {gamma: 1.5}}",
        "{'grid_losses:per_label': 1}",
        "{'grid_losses:weighted': 0.5, bce: 0.5}",
    ],
    "pixels": [
        "cross_entropy",
        "{cross_entropy: {class_weights: [0.2, 1, 4], label_smoothing: 0.05}}",
        "{cross_entropy: 1, dice: {weight: 1, foreground: true}}",
        "dice",
        "{iou: {smooth: 0.5}}",
        "{tversky: {alpha: 0.3, beta: 0.7, gamma: 1.3}}",
        "{focal: 0.5, iou: 0.5, 'grid_losses:per_pixel': 0.1}",
    ],
    "two": [
        "bce",
        "{bce: {weight: 0.5, pos_weight: auto}, dice: {weight: 0.5, smooth: 0}}",
        "{bce: 0.1, focal: {alpha: 0.6}, tversky: {gamma: 0.8}}",
    ],
}
MLP = ["--model.name", "mlp", "--model.arguments", f"{{height: {SIDE}, width: {SIDE}, hidden: [16]}}"]
UNET = ["--model.name", "unet", "--model.arguments", "{width: 4, depth: 2, norm: false}"]
NETWORKS = {"classes": MLP, "labels": MLP, "pixels": UNET, "two": UNET}
# BatchNorm of torch's, and of timm's with activations inside; the loss decides which way the gradient takes.
NORMED = [
    ("classes", "cross_entropy", ["--model.name", "test_resnet"]),
    ("classes", "{cross_entropy: {class_weights: auto}}", ["--model.name", "test_efficientnet"]),
    (
        "pixels",
        "{cross_entropy: 1, dice: 1}",
        ["--model.name", "unet", "--model.arguments", "{width: 4, depth: 2}"],
    ),
]


class Case(NamedTuple):
    """A loss on a data set, and how its global batch `step` is made and dealt out."""

    data: str
    loss: str
    network: list[str]
    batch: int
    micro_batch: int | None
    step: int
    mixing: list[str]
    synced: bool = False

    def request(self, folder):
        root = str(Path(folder) / self.data)
        words = ["--data.root", root, "--data.train-transforms", "[]", "--data.workers", "0"]
        words += ["--data.val-split", "none", "--run-dir", "unused", *self.network, *self.mixing]
        words += ["--task", TASKS[self.data], "--loss", self.loss, "--train.global-batch", str(self.batch)]
        words += ["--train.micro-batch", str(self.micro_batch or "none")]
        return read_request([*words, "--train.sync-batchnorm", str(self.synced).lower()])


def cases_for(seed):
    """Every loss once, each with a batch, cut and step of its own."""
    draws = np.random.default_rng(seed)
    cases = []
    for data, losses in LOSSES.items():
        for loss in losses:
            batch = int(draws.integers(1, 15))
            micro_batch = [None, 1, 2, 3, 5][draws.integers(5)]
            mixing = ["--data.cutmix", "1"] if draws.random() < 0.4 else []
            if data in ("classes", "labels") and draws.random() < 0.4:
                mixing += ["--data.mixup", "1"]
            step = int(draws.integers(0, SAMPLES // batch * 2))
            cases.append(Case(data, loss, NETWORKS[data], batch, micro_batch, step, mixing))
    return cases


def empty_cases(folder):
    """Global batches with every label missing, or every pixel ignored, for the losses that know of these."""
    cases = []
    for data in ("labels", "pixels", "two"):
        for loss in LOSSES[data]:
            if "grid_losses:weighted" not in loss:
                cases.append(Case(data, loss, NETWORKS[data], 2, 1 if len(cases) % 2 else None, 0, []))
    return [case._replace(step=empty_step(case, folder)) for case in cases]


def empty_step(case, folder):
    """The first step whose samples are all of those that count for nothing."""
    config = case.request(folder).config
    dataset = open_dataset(config, learning=True)
    reader = ShardReader(Folder(Path(config.data.root)), dataset, "train")
    listed = json.loads((Path(folder) / f"{case.data}.json").read_text())
    empty = {number for number in range(SAMPLES) if reader.read(number).key in listed}
    assert len(empty) == len(listed)
    plan = make_plan(config, dataset)
    return next(step for step in range(1000) if empty.issuperset(plan.batch(step).tolist()))


def normed_cases(seed):
    draws = np.random.default_rng(seed)
    made = [(*one, int(draws.integers(9, 15)), int(draws.integers(0, 2))) for one in NORMED]
    return [Case(*names, batch, None, step, [], synced=True) for *names, batch, step in made]


def job_of(case, folder, accelerator, **changes):
    request = case._replace(**changes).request(folder)
    dataset = open_dataset(request.config, learning=True)
    job = assemble(request, accelerator, dataset, checkpoint=None, progress=Progress())
    job.learn()
    return job


class Found(NamedTuple):
    gradient: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    loss: float


def found_in(job, loss):
    gradient = {name: one.grad.clone() for name, one in job.network.named_parameters()}
    return Found(gradient, {name: one.clone() for name, one in job.network.named_buffers()}, loss)


def as_a_run_takes_it(case, folder, accelerator):
    job = job_of(case, folder, accelerator)
    steps = range(case.step, case.step + 1)
    stream = training_batches(job.config, job.dataset, job.plan, accelerator, steps=steps)
    sums = accumulate(job, stream, case.step).sums[0]
    assert next(stream, None) is None
    return found_in(job, float(job.task.objective.value(accelerator.reduce(sums, "sum"))))


def whole(case, folder, accelerator):
    """The same from a single pass over the whole batch in one process."""
    job = job_of(case, folder, accelerator, synced=False, micro_batch=None)
    everything = job.plan.drawn(case.step)
    partners = None
    if case.mixing:
        positions = np.arange(case.batch)
        partners = everything.numbers[np.where(positions ^ 1 < case.batch, positions ^ 1, positions)]
    epoch = case.step // job.plan.steps_per_epoch
    work = Work(epoch, case.step, 0, 1, everything.numbers, valid=True, partners=partners)
    (batch,) = batches(job.config, job.dataset, accelerator, lambda: iter([work]), learning=True)
    inputs = Normalizer(*job.pixel_statistics, accelerator.device)(batch)
    value = job.task.objective.value(job.task.objective.sums(job.network(inputs.images), inputs).double())
    value.backward()
    return found_in(job, value.item())


def norm(tensors):
    return sum(float(one.double().pow(2).sum()) for one in tensors.values()) ** 0.5


def relative_error(found, expected):
    assert found.keys() == expected.keys()
    return norm({name: found[name] - expected[name] for name in expected}) / norm(expected)


def check(found, expected, *, name):
    """Whether anything counted in the global batch."""
    if norm(expected.gradient) == 0:
        assert expected.loss == found.loss == 0, name
        assert all(bool((one == 0).all()) for one in found.gradient.values()), name
        return False
    assert norm(expected.gradient) > 1e-4, name
    assert relative_error(found.gradient, expected.gradient) < 1e-5, name
    assert found.loss == pytest.approx(expected.loss, rel=1e-5), name
    return True


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def folder(once):
    return once("gradient-grid", make_data)


@pytest.fixture(autouse=True)
def _own_losses(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)


def make_data(folder):
    """Four data sets; of all but the first, half of the samples have nothing that counts: see NAME.json."""
    (folder / "grid_losses.py").write_text(OWN_LOSSES)
    draws = np.random.default_rng(0)
    for data in TASKS:
        source = folder / f"{data}-source"
        for place in ("images", "masks"):
            (source / place).mkdir(parents=True)
        rows, empty = [], []
        for number in range(SAMPLES):
            picture = draws.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(picture).save(source / "images" / f"{number:02d}.png")
            nothing = number % 2 == 1
            empty += [f"{number:02d}"] * nothing
            known = ["", "0", "1", "0", "1"]
            rows.append([f"{number:02d}.png", *("" if nothing else known[draws.integers(5)] for _ in LABELS)])
            values = [0, 1, 2, 255] if data == "pixels" else [0, 1, 255]
            mask = draws.choice(values, (SIDE, SIDE)).astype(np.uint8)
            if nothing:
                mask[:] = 255
            Image.fromarray(mask).save(source / "masks" / f"{number:02d}.png")
        pack_one(data, source, rows, folder)
        (folder / f"{data}.json").write_text(json.dumps(empty))


def pack_one(data, source, rows, folder):
    options = {"val_fraction": 0.0, "seed": 0}
    if data in ("classes", "labels"):
        if data == "classes":
            rows = [[row[0], LABELS[number % 3]] for number, row in enumerate(rows)]
            options |= {"label_columns": ("label",)}
        else:
            options |= {"label_columns": LABELS}
        with (source / "table.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["image", *options["label_columns"]], *rows])
        options |= {"kind": "csv", "images": source / "images", "image_column": "image"}
    place = source / "table.csv" if data in ("classes", "labels") else source
    made = find_source(place, SourceOptions(**options))
    pack(made, folder / data, workers=1, seed=0, shard_samples=10, shard_bytes=1 << 30)


def test_the_grid_knows_every_loss():
    written = " ".join(loss for losses in LOSSES.values() for loss in losses)
    assert [name for name in KNOWN if name not in written] == []


@pytest.mark.parametrize("seed", range(4))
def test_a_single_process_leaves_the_gradient_of_the_whole_batch_however_it_is_cut(seed, accelerator, folder):
    counted = 0
    for case in cases_for(100 + seed):
        counted += check(
            as_a_run_takes_it(case, folder, accelerator), whole(case, folder, accelerator), name=case
        )
    assert counted >= 15


def test_a_batch_in_which_nothing_counts_has_a_gradient_of_zero(accelerator, folder):
    for case in empty_cases(folder):
        assert not check(
            as_a_run_takes_it(case, folder, accelerator), whole(case, folder, accelerator), name=case
        )


EACH = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import test_gradient_grid as here
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes > 1
for number, case in enumerate(json.loads(sys.argv[3])):
    found = here.as_a_run_takes_it(here.Case(*case), sys.argv[2], accelerator)
    loss = torch.tensor(found.loss, dtype=torch.float64)
    parts = {"gradient": found.gradient, "buffers": found.buffers, "": {"loss": loss}}
    tensors = {f"{part}/{name}": one for part, named in parts.items() for name, one in named.items()}
    save_file(tensors, f"{number}-{accelerator.process_index}.safetensors")
accelerator.wait_for_everyone()
"""


def read(path):
    tensors = load_file(path)
    parts = [
        {name.removeprefix(f"{part}/"): one for name, one in tensors.items() if name.startswith(f"{part}/")}
        for part in ("gradient", "buffers")
    ]
    return Found(*parts, tensors["/loss"].item())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_several_processes_leave_the_gradient_of_the_whole_batch(
    processes, accelerator, folder, execute, tmp_path
):
    """Also where some have no sample at all, and for BatchNorm that is synchronised."""
    empty = empty_cases(folder)[processes - 2 :: 3]
    cases = [*cases_for(processes), *empty, *normed_cases(processes)]
    assert any(case.batch < processes for case in cases)
    (tmp_path / "each.py").write_text(EACH)
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [torchrun, f"--nproc_per_node={processes}", "each.py", HERE, folder, json.dumps(cases)]
    done = execute(command)
    assert done.returncode == 0, done.stderr
    counted = 0
    for number, case in enumerate(cases):
        first, *others = (read(tmp_path / f"{number}-{rank}.safetensors") for rank in range(processes))
        expected = whole(case, folder, accelerator)
        counted += check(first, expected, name=case)
        for other in others:
            assert other.loss == first.loss
            assert all(torch.equal(one, other.gradient[name]) for name, one in first.gradient.items())
            assert all(torch.equal(one, other.buffers[name]) for name, one in first.buffers.items())
        for name, buffer in expected.buffers.items():
            assert torch.allclose(first.buffers[name], buffer, rtol=1e-6, atol=1e-6), (case, name)
    assert counted >= 18
