"""The gradient of a global batch is that of the whole batch at once, however it is cut and dealt out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from data_pipeline.plan import Work
from training.assembly import assemble
from training.command import read_request
from training.gradients import accumulate
from training.inputs import Normalizer
from training.reading import batches, open_dataset, training_batches
from training.state import Progress

# The data set's fixture, and what to learn from it. No BatchNorm: it sees its own micro-batch only.
SIZE = "[{resize_to: {height: 24, width: 24}}]"
MLP = ["--model.name", "mlp", "--model.arguments", "{height: 24, width: 24, hidden: [16]}"]
UNET = ["--model.name", "unet", "--model.arguments", "{width: 4, depth: 2, norm: false}"]
CASES = {
    "classes": ["photo_dataset", *MLP],
    "weighted classes": [
        *("photo_dataset", *MLP),
        *("--loss", "{cross_entropy: {class_weights: [1, 2, 3], label_smoothing: 0.1}}"),
    ],
    "mixed classes": ["photo_dataset", *MLP, "--data.mixup", "1", "--data.cutmix", "1"],
    "labels": ["multilabel_dataset", "--task", "multilabel", *MLP],
    "mixed labels": ["multilabel_dataset", "--task", "multilabel", *MLP, "--data.mixup", "1"],
    "labels by frequency": [
        *("multilabel_dataset", "--task", "multilabel", *MLP),
        *("--loss", "{bce: {weight: 0.7, pos_weight: auto}, focal: 0.3}"),
    ],
    "pixels": ["segmentation_dataset", "--task", "segmentation", *UNET],
    "areas": [
        *("segmentation_dataset", "--task", "segmentation", *UNET),
        *("--loss", "{bce: 0.5, dice: 0.5, tversky: {weight: 0.3, gamma: 1.3}, iou: 0.2}"),
    ],
    "areas of classes": [
        *("segmentation_dataset", "--task", "segmentation", *UNET),
        *("--loss", "{cross_entropy: 1, dice: {weight: 1, foreground: true}}", "--data.cutmix", "1"),
    ],
}
BATCH = 14


def request_of(root, *words):
    common = ["--data.train-transforms", SIZE, "--data.workers", "0", "--train.global-batch", str(BATCH)]
    return read_request(["--data.root", str(root), *common, "--run-dir", "unused", *words])


def job_of(request, accelerator):
    dataset = open_dataset(request.config, learning=True)
    job = assemble(request, accelerator, dataset, checkpoint=None, progress=Progress())
    job.learn()
    return job


def gradient(request, accelerator, *, step=1):
    """Of the parameters, by name, as a run takes it; and the loss."""
    job = job_of(request, accelerator)
    stream = training_batches(job.config, job.dataset, job.plan, accelerator, steps=range(step, step + 1))
    share = accumulate(job, stream, step)
    return {name: one.grad for name, one in job.network.named_parameters()}, job, share


def whole(request, accelerator, *, step=1):
    """The same from one forward and backward pass over the whole batch, without any of our arithmetic."""
    job = job_of(request, accelerator)
    config = job.config
    mixing = bool(config.data.mixup or config.data.cutmix)
    everything = job.plan.drawn(step)
    positions = np.arange(BATCH)
    partners = everything.take(positions ^ 1) if mixing else None
    drawn = everything.take(positions)
    work = Work(
        step // job.plan.steps_per_epoch,
        step,
        0,
        1,
        drawn.numbers,
        valid=True,
        first=0,
        copies=drawn.copies,
        partners=partners.numbers if mixing else None,
        partner_copies=partners.copies if mixing else None,
    )
    (batch,) = batches(config, job.dataset, accelerator, lambda: iter([work]), learning=True)
    inputs = Normalizer(*job.pixel_statistics, accelerator.device)(batch)
    outputs = job.network(inputs.images)
    value = job.task.objective.value(job.task.objective.sums(outputs, inputs).double())
    value.backward()
    return {name: one.grad for name, one in job.network.named_parameters()}, value.item()


def relative_error(found, expected):
    difference = sum(float((found[name] - expected[name]).pow(2).sum()) for name in expected)
    return (difference / sum(float(one.pow(2).sum()) for one in expected.values())) ** 0.5


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.mark.parametrize("micro_batch", [14, 5, 1])
@pytest.mark.parametrize("case", CASES)
def test_micro_batches_of_any_size_leave_the_gradient_of_the_whole_batch(
    case, micro_batch, accelerator, request
):
    fixture, *words = CASES[case]
    root = request.getfixturevalue(fixture)
    asked = request_of(root, *words, "--train.micro-batch", str(micro_batch))
    found, job, share = gradient(asked, accelerator)
    expected, value = whole(asked, accelerator)
    assert all(one.abs().max() > 0 for one in expected.values())
    assert relative_error(found, expected) < 1e-5
    assert float(job.task.objective.value(share.sums[0])) == pytest.approx(value, rel=1e-5)


def test_looking_ahead_leaves_running_statistics_as_one_pass_would(segmentation_dataset, accelerator):
    words = ["--task", "segmentation", "--model.name", "unet", "--model.arguments", "{width: 4, depth: 2}"]
    asked = request_of(segmentation_dataset, *words, "--train.micro-batch", "5")
    ahead = request_of(segmentation_dataset, *words, "--train.micro-batch", "5", "--loss", "dice")
    plain, overlapping = (gradient(one, accelerator)[1].network for one in (asked, ahead))
    buffers = dict(plain.named_buffers())
    assert len(buffers) > 0
    for name, buffer in overlapping.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_dropout_is_the_same_when_a_batch_is_looked_at_twice(segmentation_dataset, accelerator):
    """Else the gradient would be that of areas that no pass has seen."""
    words = ["--task", "segmentation", "--loss", "dice", *UNET]
    whole_at_once = request_of(segmentation_dataset, *words, "--train.micro-batch", "14")
    job = job_of(whole_at_once, accelerator)
    seen = []

    def noisy(_module, _arguments, output):
        dropped = torch.nn.functional.dropout(output, 0.5)
        seen.append(dropped.detach())
        return dropped

    job.network.register_forward_hook(noisy)
    config = request_of(segmentation_dataset, *words, "--train.micro-batch", "5").config
    stream = training_batches(config, job.dataset, job.plan, accelerator, steps=range(1))
    accumulate(job, stream, 0)
    assert len(seen) == 6
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(first, second)


THREE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_gradients as here
from accelerate import Accelerator
from safetensors.torch import save_file

accelerator = Accelerator(cpu=True)
for number, (root, *words) in enumerate(json.loads(sys.argv[2])):
    asked = here.request_of(root, *words, "--train.micro-batch", "2")
    found, job, share = here.gradient(asked, accelerator)
    copies = {name: one.clone() for name, one in found.items()}
    save_file(copies, f"{number}-{accelerator.process_index}.safetensors")
accelerator.wait_for_everyone()
"""


@pytest.mark.slow
def test_three_uneven_processes_leave_the_gradient_of_the_whole_batch(
    accelerator, execute, tmp_path, request
):
    """14 samples are 5 + 5 + 4, in micro-batches of 2: three passes, three, and two."""

    cases = [[str(request.getfixturevalue(fixture)), *words] for fixture, *words in CASES.values()]
    (tmp_path / "three.py").write_text(THREE)
    torchrun = Path(sys.executable).parent / "torchrun"
    here = Path(__file__).parent
    done = execute([torchrun, "--nproc_per_node=3", "three.py", here, json.dumps(cases)])
    assert done.returncode == 0, done.stderr
    for number, (name, (root, *words)) in enumerate(zip(CASES, cases, strict=True)):
        expected, _ = whole(request_of(root, *words), accelerator)
        for process in range(3):
            found = load_file(tmp_path / f"{number}-{process}.safetensors")
            assert relative_error(found, expected) < 1e-5, (name, process)
