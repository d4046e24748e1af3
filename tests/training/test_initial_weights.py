"""Another run's weights for a new one: whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.fault import UserError
from data_pipeline.index import read_dataset
from training.command import read_request
from training.initial_weights import initial_file, load_initial


def network(outputs=10):
    return torch.nn.Sequential(
        *(torch.nn.Linear(4, 4) for _ in range(6)), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, outputs)
    )


@pytest.fixture
def dataset(digits):
    return read_dataset(digits)


@pytest.fixture
def run(tmp_path, dataset):
    """The parts of a finished run that matter here."""
    folder = tmp_path / "other"
    (folder / "weights").mkdir(parents=True)
    for name in ("best", "last", "epoch-0002"):
        save_file(network().state_dict(), folder / "weights" / f"{name}.safetensors")
    about = {"task": "multiclass", "classes": list(dataset.classes)}
    (folder / "weights" / "model.json").write_text(json.dumps(about))
    return folder


def found(run_dir, path, *flags):
    return initial_file(read_request(["--run-dir", str(run_dir), "--init-from", str(path), *flags]))


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "--init-from" in caught.value.what
    return caught.value


def test_a_run_has_its_best_weights_or_its_last_or_those_that_are_named(run, tmp_path):
    weights = run / "weights"
    assert initial_file(read_request([])) is None
    assert found(tmp_path / "new", run) == weights / "best.safetensors"
    assert found(tmp_path / "new", run, "--weights", "last") == weights / "last.safetensors"
    assert found(tmp_path / "new", run, "--weights", "epoch-0002") == weights / "epoch-0002.safetensors"
    assert found(tmp_path / "new", weights / "last.safetensors") == weights / "last.safetensors"
    error = refusal(lambda: found(tmp_path / "new", run, "--weights", "worst"))
    assert error.mend == "--weights best or epoch-0002 or last"
    (weights / "best.safetensors").unlink()
    assert found(tmp_path / "new", run) == weights / "last.safetensors"


def test_what_is_no_run_no_checkpoint_and_no_file_is_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("text")
    for path in ("nowhere", "empty", "text.pth"):
        assert refusal(lambda path=path: found(tmp_path / "new", tmp_path / path)).code == "CONFIG"
    assert refusal(lambda: found(run, run / "weights", "--fresh")).code == "USAGE"


def test_every_tensor_is_taken(run, dataset):
    file, new = run / "weights" / "best.safetensors", network()
    report = load_initial(new, file, dataset, task="multiclass")
    tensors = load_file(file)
    assert report.loaded == report.tensors == len(tensors)
    assert new.state_dict().keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in new.state_dict().items())


def test_other_classes_are_refused_by_number_and_by_name(run, dataset):
    file = run / "weights" / "best.safetensors"

    def load(**changes):
        return refusal(lambda: load_initial(network(), file, replace(dataset, **changes), task="multiclass"))

    fewer, renamed = load(classes=dataset.classes[:9]), load(classes=("zero", *dataset.classes[1:]))
    assert "knows 10 classes, the data set has 9" in fewer.what
    assert "knows the class '0', where the data set has 'zero'" in renamed.what
    for error in (fewer, renamed):
        assert error.code == "RESUME"
        assert error.mend == f"use --model.pretrained {file}, which leaves the head out"
    assert refusal(lambda: load_initial(network(), file, dataset, task="multilabel")).code == "RESUME"


def test_another_network_is_refused_by_its_first_tensors_and_left_as_it_was(run, dataset):
    other = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_initial(other, run / "weights" / "best.safetensors", dataset, task="multiclass")
    lines = caught.value.what.splitlines()
    assert caught.value.code == "RESUME"
    assert "0.bias: float32 [4] in the file, float32 [3] in the network" in lines[0]
    assert len(lines) == 11
    assert lines[-1] == "and 9 more"
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(run, dataset, bad):
    tensors = network().state_dict()
    tensors["2.weight"][0, 0] = bad
    file = Path(run / "weights" / "best.safetensors")
    save_file(tensors, file)
    error = refusal(lambda: load_initial(network(), file, dataset, task="multiclass"))
    assert error.code == "RESUME"
    assert error.what.endswith("holds numbers that are not finite: 2.weight")
