"""Evaluation: every sample once, on process zero's network, whatever the cut and the processes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.index import read_dataset
from data_pipeline.plan import Work
from data_pipeline.produce import Recipe
from data_pipeline.read import ShardReader
from data_pipeline.store import Folder
from data_pipeline.stream import stream
from training.command import read_request
from training.counts import exact_sums
from training.evaluation import Examined, evaluate
from training.inputs import Normalizer
from training.labels import learned_labels
from training.networks.build import build_network
from training.process import Place
from training.tasks import make_task


def scores_of(network, task, config, dataset, accelerator):
    normalize = Normalizer(dataset.mean, dataset.std, accelerator.device)
    return evaluate(Examined(network, task, config, dataset, accelerator, normalize))


def small_network():
    return build_network("test_resnet", task="multiclass", channels=1, outputs=10, arguments={})


def config_of(digits, *flags):
    return read_request(["--data.root", str(digits), "--data.workers", "0", *flags]).config


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return small_network()


@pytest.fixture
def task(digits):
    config = config_of(digits)
    return make_task(learned_labels(config, read_dataset(digits)), config.loss)


def test_the_scores_are_those_of_the_whole_split_at_once(digits, accelerator, network, task):
    config, dataset = config_of(digits), read_dataset(digits)
    scores = scores_of(network, task, config, dataset, accelerator)
    recipe = Recipe(Folder(digits), dataset, "val", (), 0)
    work = Work(0, 0, 0, 1, np.arange(359), valid=True)
    (batch,) = stream(recipe, lambda: iter([work]), workers=0, prefetch=1)
    inputs = Normalizer(dataset.mean, dataset.std, torch.device("cpu"))(batch)
    with torch.inference_mode():
        logits = network.eval()(inputs.images)
    right = int((logits.argmax(dim=1) == inputs.targets).sum())
    assert scores.metrics["accuracy"] == right / 359
    loss = torch.nn.functional.cross_entropy(logits, inputs.targets).item()
    assert scores.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    proof = scores.certificate
    assert (proof.expected, proof.seen, proof.unique) == (359, 359, 359)
    assert proof.digest == dataset.split("val").keys_digest
    reader = ShardReader(Folder(digits), dataset, "val")
    assert len({reader.read(number).key for number in range(359)}) == 359


@pytest.mark.parametrize("batch", [1, 7, 359, 1000])
def test_the_cut_into_batches_changes_no_count(digits, accelerator, network, task, batch):
    dataset = read_dataset(digits)
    reference = scores_of(network, task, config_of(digits), dataset, accelerator)
    config = config_of(digits, "--eval.batch", str(batch), "--data.workers", "3")
    scores = scores_of(network, task, config, dataset, accelerator)
    assert scores.certificate == reference.certificate
    assert scores.metrics["accuracy"] == reference.metrics["accuracy"]
    assert scores.metrics["loss"] == pytest.approx(reference.metrics["loss"], rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_the_network_as_it_was(digits, accelerator, network, task, training):
    network.train(training)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    scores_of(network, task, config_of(digits), read_dataset(digits), accelerator)
    assert network.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_an_evaluation_of_other_samples_than_those_that_were_packed_is_an_error(
    digits, accelerator, network, task
):
    dataset = read_dataset(digits)
    split = replace(dataset.split("val"), keys_digest="0" * 16)
    changed = replace(dataset, splits={**dataset.splits, "val": split})
    with pytest.raises(RuntimeError, match="0000000000000000"):
        scores_of(network, task, config_of(digits), changed, accelerator)


THREE = """
import json, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from data_pipeline.index import read_dataset
from training.labels import learned_labels
from training.tasks import make_task
sys.path.insert(0, sys.argv[2])
from test_evaluation import config_of, scores_of, small_network

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
torch.manual_seed(rank)
network = small_network()
with torch.no_grad():
    for tensor in network.state_dict().values():
        tensor += rank  # weights, running statistics and the count of batches all differ
config, dataset = config_of(sys.argv[1], "--eval.batch", "50"), read_dataset(Path(sys.argv[1]))
task = make_task(learned_labels(config, dataset), config.loss)
scores = scores_of(network, task, config, dataset, accelerator)
Path(f"scores-{rank}.json").write_text(json.dumps(scores.as_json()))
accelerator.wait_for_everyone()
"""


@pytest.mark.slow
def test_three_processes_whose_networks_drifted_apart_score_that_of_process_zero(
    digits, accelerator, network, execute, tmp_path
):
    (tmp_path / "three.py").write_text(THREE)
    torchrun = Path(sys.executable).parent / "torchrun"
    done = execute([torchrun, "--nproc_per_node=3", "three.py", digits, Path(__file__).parent])
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"scores-{rank}.json").read_text()) for rank in range(3)]
    config, dataset = config_of(digits, "--eval.batch", "50"), read_dataset(digits)
    task = make_task(learned_labels(config, dataset), config.loss)
    alone = scores_of(network, task, config, dataset, accelerator).as_json()
    assert found[0]["certificate"] == alone["certificate"]
    assert found[0]["metrics"]["accuracy"] == alone["metrics"]["accuracy"]
    assert found[0]["classes"] == alone["classes"]
    assert found[0]["metrics"]["loss"] == alone["metrics"]["loss"], "to the last bit"
    assert found[1] == found[2] == found[0]


def test_an_evaluation_is_broken_off_before_the_next_batch_and_gives_signs_of_life_until_then(
    digits, accelerator, network, task
):
    dataset, place = read_dataset(digits), Place()
    normalize = Normalizer(dataset.mean, dataset.std, accelerator.device)
    config = config_of(digits, "--eval.batch", "50")
    examined = Examined(network, task, config, dataset, accelerator, normalize)
    network.train()
    assert evaluate(examined, place=place, asked=lambda: place.beats == 3) is None
    assert place.beats == 3
    assert len(place.samples) == 50
    assert network.training
    assert evaluate(examined, place=place).certificate.seen == 359


@given(rows=st.lists(st.tuples(*[st.floats(-1e30, 1e30)] * 2), min_size=1, max_size=20), seed=st.randoms())
def test_sums_of_batches_do_not_depend_on_their_order(rows, seed):
    shuffled = seed.sample(rows, len(rows))
    one, other = (exact_sums(np.array(each, np.float64)) for each in (rows, shuffled))
    assert one.tolist() == other.tolist()
    assert one.tolist() == [float(sum(map(Fraction, column))) for column in zip(*rows, strict=True)]


def test_sums_of_batches_that_are_not_finite_are_not_finite():
    infinite = np.array([[1.0, np.inf, 1.0], [2.0, -np.inf, np.nan]])
    assert exact_sums(infinite)[0] == 3
    assert not exact_sums(infinite)[1:].isfinite().any()
