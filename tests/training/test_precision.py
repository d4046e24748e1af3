"""Half precision: what stays float32, and what a scaler's skipped steps leave behind, count and end with."""

from __future__ import annotations

import contextlib
import json
import math
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from training.assembly import assemble, join
from training.command import read_request
from training.evaluation import Examined, evaluate
from training.introduction import introduce
from training.nonfinite import LOWEST_SCALE, judge
from training.process import Ended
from training.reading import open_dataset, training_batches
from training.state import Progress
from training.step import take_step

BATCH = 16
NET = """
import torch

def net(channels, outputs):
    layers = [torch.nn.Linear(1024 * channels, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(inplace=True)]
    return torch.nn.Sequential(torch.nn.Flatten(), *layers, torch.nn.Linear(16, outputs))
"""


@pytest.fixture(scope="module", autouse=True)
def _small(tmp_path_factory):
    """A module with a network that half precision on a CPU does not take long for."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "halfnets.py").write_text(NET)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
    sys.modules.pop("halfnets", None)


@pytest.fixture(autouse=True)
def _precision_of_its_own(monkeypatch):
    """Accelerate keeps one precision for all of a process; and `join` would set the threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def request_of(digits, *flags):
    common = {
        "--data.root": digits,
        "--data.workers": 0,
        "--data.train-transforms": "[]",
        "--model.name": "halfnets:net",
        "--train.global-batch": BATCH,
        "--train.ema": 0.9,
        "--run-dir": "unused",
    }
    return read_request([str(word) for pair in common.items() for word in pair] + list(flags))


def job_of(request, accelerator):
    dataset = open_dataset(request.config, learning=True)
    job = assemble(request, accelerator, dataset, checkpoint=None, progress=Progress())
    job.learn()
    return job


def take(job, step):
    stream = training_batches(job.config, job.dataset, job.plan, job.accelerator, steps=range(step, step + 1))
    with contextlib.closing(stream):
        taken = take_step(job, stream, step)
    loss = float(job.task.objective.value(taken.report().sums))
    return taken, judge(job, taken, finite=math.isfinite(loss))


def everything(job):
    tensors = {f"network {name}": one for name, one in job.network.state_dict().items()}
    tensors |= {f"average {name}": one for name, one in job.average.module.state_dict().items()}
    for number, of in job.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer {number} {name}": one for name, one in of.items()}
    return {name: one.detach().clone() for name, one in tensors.items()}


def floats(tensors):
    return {one.dtype for one in tensors if one.is_floating_point()}


def test_under_bf16_layers_give_bf16_and_all_that_is_kept_is_float32(digits, monkeypatch):
    request = request_of(digits, "--train.precision", "bf16", "--optim.clip-norm", "1")
    job = job_of(request, join(request.config))
    inside, gradients, sums = [], [], []
    layer = job.network[1]
    layer.register_forward_hook(lambda _module, _given, out: inside.append(out.dtype))
    layer.weight.register_post_accumulate_grad_hook(lambda one: gradients.append(one.grad.dtype))
    objective_sums = type(job.task.objective).sums

    def watched(self, outputs, inputs):
        found = objective_sums(self, outputs, inputs)
        sums.append(found.dtype)
        return found

    monkeypatch.setattr(type(job.task.objective), "sums", watched)
    for step in range(2):
        taken, _ = take(job, step)
    assert set(inside) == {torch.bfloat16}
    assert set(gradients) == set(sums) == {torch.float32}
    assert taken.told.tensor().dtype == torch.float64
    assert floats(everything(job).values()) == {torch.float32}
    scores = evaluate(
        Examined(job.network, job.task, job.config, job.dataset, job.accelerator, job.normalizer)
    )
    assert 0 < scores.metrics["loss"] < 10
    right = scores.metrics["accuracy"] * 359
    assert right == pytest.approx(round(right), abs=1e-9), (
        "a metric is a quotient of whole numbers in float64"
    )


def test_tf32_is_said_where_a_gpu_rounds_and_nowhere_else(digits):
    request = request_of(digits, "--train.tf32", "true")
    job, lines = job_of(request, join(request.config)), []
    introduce(job, lines.append)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert lines[0].endswith(" parameters, fp32")


@pytest.fixture
def half(digits, monkeypatch):
    """`half(flags)`: a job in fp16 with a real scaler, on a CPU, which `join` refuses: it is slow there."""

    def make(*flags, scale=2.0**10):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        monkeypatch.setattr(accelerator, "native_amp", True)
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
        return job_of(request_of(digits, *flags), accelerator)

    return make


class Plant:
    """Puts infinity into what the first layer gives, or into its gradient, for as long as it is on."""

    def __init__(self, job):
        self.on, self.forward = False, False
        job.network[1].register_forward_hook(self.after)

    def after(self, _module, _given, out):
        assert out.dtype == torch.float16
        if self.on and self.forward:
            return out * torch.inf
        if self.on and out.requires_grad:
            out.register_hook(lambda gradient: gradient * torch.inf)
        return None


RULES = [("--optim.name", "adamw"), ("--optim.name", "adamw", "--optim.arguments", "{fused: true}")]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("limit", [(), ("--optim.clip-norm", "1"), ("--optim.clip-value", "0.1")])
def test_a_step_that_overflows_lowers_the_scale_and_changes_nothing_else(rule, limit, half):
    """With rules that take a step of their own kind too: those that are fused are called all the same."""
    job = half(*rule, *limit)
    plant = Plant(job)
    assert take(job, 0)[1] is None
    before, state = everything(job), job.accelerator.scaler.state_dict()
    plant.on = True
    taken, left_out = take(job, 1)
    assert taken.skipped == "its gradient overflows fp16 at a scale of 1024, from here on 512"
    assert left_out == ("scale", f"step 2 is left out: {taken.skipped}")
    after = everything(job)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert job.accelerator.scaler.state_dict() == {**state, "scale": 512.0, "_growth_tracker": 0}
    assert (job.progress.rescaled, job.progress.skipped) == (1, 0)
    plant.on = False
    assert take(job, 2)[1] is None
    assert not torch.equal(everything(job)["network 1.weight"], before["network 1.weight"])


def test_the_gradient_does_not_depend_on_the_scale(half):
    """It is unscaled before it is clipped; powers of two round nothing."""
    plain = half("--optim.clip-norm", "0.01", scale=1.0)
    take(plain, 0)
    found = everything(plain)
    AcceleratorState._reset_state()
    scaled = half("--optim.clip-norm", "0.01", scale=2.0**6)
    take(scaled, 0)
    moments = {name: one for name, one in everything(scaled).items() if name.endswith("exp_avg")}
    distance = sum(float((one - found[name]).square().sum()) for name, one in moments.items())
    size = sum(float(found[name].square().sum()) for name in moments)
    assert size**0.5 == pytest.approx(0.1 * 0.01, rel=1e-3), "the first moment is a tenth of what was clipped"
    assert distance**0.5 < 0.01 * size**0.5


def test_a_scale_at_its_lowest_ends_the_run_with_the_layer(half):
    job = half("--train.on-nonfinite", "skip", scale=4 * LOWEST_SCALE)
    plant = Plant(job)
    plant.on = True
    for step in range(2):
        assert take(job, step)[1].reason == "scale"
    with pytest.raises(Ended, match="step 3: at fp16's lowest scale of 1, the gradient of ") as end:
        take(job, 2)
    assert (end.value.code, len(end.value.samples)) == ("NONFINITE", BATCH)
    assert "--train.precision bf16" in end.value.hint
    assert job.progress.rescaled == 2


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_that_no_scale_makes_finite_is_not_the_scalers_to_skip(policy, half):
    job = half("--train.on-nonfinite", policy)
    plant = Plant(job)
    before = everything(job)
    plant.on = plant.forward = True
    if policy == "stop":
        with pytest.raises(Ended, match="step 1: the output of 1 is not finite in 16 samples") as end:
            take(job, 0)
        assert end.value.layer == "1"
    else:
        _, left_out = take(job, 0)
        assert left_out.reason == "nonfinite"
        assert left_out.line.startswith("step 1 is left out: the output of 1 is not finite")
        assert (job.progress.rescaled, job.progress.skipped) == (0, 1)
    after = everything(job)
    assert all(torch.equal(after[name], before[name]) for name in before), "running statistics too"


def test_counts_of_steps_left_out_survive_a_checkpoint():
    progress = Progress(skipped=3, rescaled=2, nonfinite_row=1)
    again = Progress.from_json(json.loads(json.dumps(progress.as_json(), allow_nan=False)))
    assert again == progress
