"""A job is put together, or refused with all that is needed to mend it before anything is trained."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from data_pipeline.fault import UserError
from training.assembly import assemble
from training.command import read_request
from training.inputs import pixel_statistics
from training.reading import open_dataset
from training.state import Progress
from training.weights import about_model, check_fits, read_weights

SMALL = ["--model.name", "mlp", "--model.arguments", "{height: 24, width: 24, hidden: [16]}"]


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def job_of(accelerator, tmp_path):
    """`job_of(root, *words)`: the job that a command line makes."""

    def call(root, *words):
        common = ["--data.root", str(root), "--train.global-batch", "8", "--run-dir", str(tmp_path / "run")]
        request = read_request([*common, *SMALL, *words])
        dataset = open_dataset(request.config, learning=True)
        return assemble(request, accelerator, dataset, checkpoint=None, progress=Progress())

    return call


@pytest.mark.parametrize(
    ("fixture", "words", "what", "mend"),
    [
        ("photo_dataset", ["--eval.best", "acc"], "eval.best: 'acc'", "accuracy"),
        ("photo_dataset", ["--eval.best", "train_loss"], "eval.best: 'train_loss'", "macro_f1"),
        ("photo_dataset", ["--data.val-split", "none", "--eval.best", "accuracy"], "eval.best", "train_loss"),
        ("photo_dataset", ["--loss", "dice"], "loss.dice: ", "cross_entropy"),
        ("photo_dataset", ["--loss", "bce"], "loss.bce: ", "cross_entropy"),
        ("photo_dataset", ["--loss", "nowhere:Loss"], "--loss: cannot load 'nowhere:Loss'", "module:name"),
        ("photo_dataset", ["--loss", "{cross_entropy: {class_weights: [1, 2]}}"], "2", "3"),
        ("photo_dataset", ["--model.name", "unet"], "unet", "multiclass"),
        ("photo_dataset", ["--model.name", "resnet18d0"], "resnet18d0", "did you mean resnet18d?"),
        ("photo_dataset", ["--model.freeze", "[layer9]"], "model.freeze: 'layer9'", "head"),
        ("photo_dataset", ["--model.freeze", "[body, head]"], "nothing is left to learn", "body"),
        ("photo_dataset", ["--optim.groups", "[{match: layer9, lr: 1}]"], "layer9", ""),
        ("photo_dataset", ["--optim.arguments", "{epsilon: 1}"], "epsilon", "eps"),
        ("photo_dataset", ["--optim.schedule", "{step: {step_size: 0}}"], "step_size", ""),
        ("photo_dataset", ["--task", "multilabel"], "task: 'multilabel'", "--task multiclass"),
        (
            "multilabel_dataset",
            ["--task", "multilabel", "--loss", "cross_entropy"],
            "loss.cross_entropy",
            "bce",
        ),
        ("multilabel_dataset", ["--task", "multilabel", "--model.name", "smp/Unet"], "smp/Unet", ""),
        ("segmentation_dataset", ["--task", "segmentation"], "mlp", "unet"),
        ("segmentation_dataset", ["--task", "segmentation", "--data.mixup", "1"], "data.mixup", "cutmix"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_trained(
    fixture, words, what, mend, job_of, request
):
    with pytest.raises(UserError) as caught:
        job_of(request.getfixturevalue(fixture), *words)
    assert caught.value.code == "CONFIG"
    assert what in caught.value.what
    assert mend in caught.value.mend + caught.value.what


def test_pixels_are_normalised_by_the_data_sets_statistics_unless_others_are_given(photo_dataset):
    config = read_request(["--data.root", str(photo_dataset), "--train.global-batch", "8"]).config
    dataset = open_dataset(config, learning=True)
    assert pixel_statistics(config, dataset) == (dataset.mean, dataset.std)
    words = ["--data.mean", "[0.5, 0.4, 0.3]", "--data.std", "[0.2, 0.2, 0.1]"]
    assert pixel_statistics(read_request(words).config, dataset) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    with pytest.raises(UserError, match=r"data\.std: 1 values, the pictures have 3 channels"):
        pixel_statistics(read_request(["--data.std", "[0.2]"]).config, dataset)


@pytest.mark.parametrize(
    ("fixture", "words"),
    [
        ("photo_dataset", ["--loss", "{cross_entropy: {class_weights: auto}}"]),
        ("multilabel_dataset", ["--task", "multilabel", "--loss", "{bce: {pos_weight: auto}}"]),
        (
            "segmentation_dataset",
            ["--task", "segmentation", "--model.name", "unet", "--model.arguments", "{width: 4, depth: 1}"],
        ),
    ],
)
def test_weights_come_back_with_their_network_task_loss_and_thresholds(fixture, words, job_of, request):
    job = job_of(request.getfixturevalue(fixture), *words)
    folder = job.request.run_dir / "weights"
    folder.mkdir(parents=True)
    job.progress.thresholds = {"best": [0.25] * job.task.outputs}
    (folder / "model.json").write_text(about_model(job))
    for name in ("best", "last"):
        save_file(job.network.state_dict(), folder / f"{name}.safetensors")
    saved = read_weights(job.request)
    check_fits(saved, job.dataset)
    expected = job.network.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.network.state_dict().items())
    assert not saved.network.training
    assert saved.classes == job.dataset.classes
    assert saved.thresholds == [0.25] * job.task.outputs
    last = read_request(["--run-dir", str(job.request.run_dir), "--weights", "last"])
    assert read_weights(last).thresholds is None
    sums = torch.linspace(1, 2, job.task.objective.size, dtype=torch.float64)
    assert torch.equal(saved.task.objective.value(sums), job.task.objective.value(sums))
    outputs = torch.randn(2, job.task.outputs, *([4, 4] if "segmentation" in fixture else []))
    assert torch.equal(saved.task.probabilities(outputs), job.task.probabilities(outputs))


@pytest.mark.parametrize("damage", ["no file", "no json", "another format", "no classes", "no tensors"])
def test_damaged_weights_are_refused_in_two_lines(damage, photo_dataset, job_of):
    job = job_of(photo_dataset)
    folder = job.request.run_dir / "weights"
    folder.mkdir(parents=True)
    about = json.loads(about_model(job))
    if damage == "another format":
        about["format"] = 99
    if damage == "no classes":
        del about["classes"]
    (folder / "model.json").write_text("{" if damage == "no json" else json.dumps(about))
    if damage != "no file":
        (folder / "best.safetensors").write_bytes(b"nothing")
    if damage not in ("no file", "no tensors"):
        save_file(job.network.state_dict(), folder / "best.safetensors")
        assert load_file(folder / "best.safetensors")
    with pytest.raises(UserError, match=r"--weights: cannot read"):
        read_weights(job.request)


def test_weights_are_not_scored_on_another_kind_of_data(photo_dataset, multilabel_dataset, job_of):
    job = job_of(photo_dataset)
    folder = job.request.run_dir / "weights"
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(about_model(job))
    save_file(job.network.state_dict(), folder / "best.safetensors")
    saved = read_weights(job.request)
    config = read_request(["--data.root", str(multilabel_dataset), "--task", "multilabel"]).config
    with pytest.raises(UserError, match="is for multiclass, the data set for multilabel"):
        check_fits(saved, open_dataset(config, learning=False))


def test_frozen_parameters_have_no_gradient_and_thawed_ones_get_one(photo_dataset, job_of):
    words = ["--model.name", "test_resnet", "--model.freeze", "[body]", "--model.unfreeze", "{layer3: 2st}"]
    job = job_of(photo_dataset, "--model.arguments", "{}", *words)

    def learning():
        return {name for name, one in job.network.named_parameters() if one.requires_grad}

    job.learn()
    assert learning() == job.head
    frozen = [module for name, module in job.network.named_modules() if name == "bn1"]
    assert [module.training for module in frozen] == [False]
    job.thaw(2)
    assert learning() > job.head
    assert all(name in job.head or name.startswith("layer3.") for name in learning())
    in_optimizer = {id(one) for group in job.optimizer.param_groups for one in group["params"]}
    assert in_optimizer == {id(one) for name, one in job.network.named_parameters() if name in learning()}
