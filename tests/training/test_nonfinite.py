"""A step that is not finite: told with step, samples and layer; nothing is made of it, nothing saved."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from training.assembly import assemble
from training.buffer_copies import BufferCopies
from training.clipping import clip_gradients
from training.command import read_request
from training.config import OptimConfig
from training.evaluation import Examined, evaluate
from training.nonfinite import IN_A_ROW, check_weights, judge
from training.nonfinite.diagnosis import SHOWN, diagnose
from training.nonfinite.layer_watch import BackwardWatch, ForwardWatch, rows_not_finite
from training.plots import draw_plots
from training.process import Ended
from training.reading import open_dataset, training_batches
from training.state import Progress
from training.step import take_step

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
TRAPS = '''
"""A network, and a loss, that single pictures are too much for: those whose pixels add up to a given sum."""
import torch
from torch.nn import functional as F

SENTINEL = 1000.0


class Trap(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.hit = kind, None

    def forward(self, x):
        if self.kind == "output":
            return torch.where(self.hit[:, None, None, None], torch.nan, x)
        if self.kind == "gradient":
            out = x.clone()
            out[self.hit] = x[self.hit] + (x[self.hit] * 0).sqrt()  # 0, but with an infinite slope
            return out
        return x


class Net(torch.nn.Module):
    def __init__(self, channels, outputs, kind="output", victims=()):
        super().__init__()
        self.register_buffer("victims", torch.tensor(victims, dtype=torch.float64), persistent=False)
        self.first = torch.nn.Conv2d(channels, 4, 3, padding=1)
        self.trap = Trap(kind)
        self.norm = torch.nn.BatchNorm2d(4)
        self.act = torch.nn.ReLU(inplace=True)
        self.drop = torch.nn.Dropout(0.2)
        self.head = torch.nn.Linear(4, outputs)

    def forward(self, images):
        sums = images.flatten(1).double().sum(dim=1)
        self.trap.hit = ((sums[:, None] - self.victims).abs() < 1e-6).any(dim=1)
        x = self.act(self.norm(self.trap(self.first(images)))).mean(dim=(2, 3))
        x = self.head(self.drop(x))
        return torch.where(self.trap.hit[:, None], SENTINEL, x) if self.trap.kind == "loss" else x


def loss(outputs, targets):
    """Infinite, with a slope of zero, for the outputs that the trap gives."""
    each = F.cross_entropy(outputs, targets, reduction="none")
    return torch.where(outputs[:, 0] == SENTINEL, torch.inf, each)


def slope(outputs, targets):
    """Finite, with an infinite slope, for the outputs that the trap gives."""
    each = F.cross_entropy(outputs, targets, reduction="none")
    return each + torch.where(outputs[:, 0] == SENTINEL, outputs[:, 0] * 0, 1.0).sqrt()
'''
BATCH = 16


@pytest.fixture(scope="module")
def traps(tmp_path_factory):
    """The folder with the module `traps`, which can be imported from here."""
    folder = tmp_path_factory.mktemp("traps")
    (folder / "traps.py").write_text(TRAPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        yield folder
    sys.modules.pop("traps", None)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def job_of(digits, traps, accelerator):
    """`job_of(flags)`: a job that is ready to learn; `victims` are sums of pixels."""

    def make(*flags, kind="output", victims=()):
        job = job_with(accelerator, digits, *flags, kind=kind, victims=victims)
        job.learn()
        return job

    return make


def job_with(accelerator, root, *flags, kind, victims):
    arguments = json.dumps({"kind": kind, "victims": list(victims)})
    common = {
        "--data.root": root,
        "--data.train-transforms": "[]",
        "--data.workers": 0,
        "--model.name": "traps:Net",
        "--model.arguments": arguments,
        "--train.global-batch": BATCH,
        "--train.ema": 0.9,
        "--run-dir": "unused",
    }
    request = read_request([str(word) for pair in common.items() for word in pair] + list(flags))
    dataset = open_dataset(request.config, learning=True)
    return assemble(request, accelerator, dataset, checkpoint=None, progress=Progress())


def batches_of(job, step):
    return training_batches(job.config, job.dataset, job.plan, job.accelerator, steps=range(step, step + 1))


def pictures(job, step):
    """Keys and sums of pixels of this process's part of a step."""
    found = {}
    for batch in batches_of(job, step):
        sums = job.normalizer(batch).images.flatten(1).double().sum(dim=1).tolist()
        found |= dict(zip(batch.keys, sums, strict=True))
    return found


def take(job, *steps):
    """Take these steps, and judge each as the recorder does."""
    taken = None
    for step in steps:
        with contextlib.closing(batches_of(job, step)) as batches:
            taken = take_step(job, batches, step)
        loss = float(job.task.objective.value(taken.report().sums))
        judge(job, taken, finite=math.isfinite(loss))
        job.progress.step = step + 1
    return taken


def everything(job):
    """All that a step changes, by name."""
    tensors = {f"network {name}": one for name, one in job.network.state_dict().items()}
    tensors |= {f"average {name}": one for name, one in job.average.module.state_dict().items()}
    for number, of in job.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer {number} {name}": one for name, one in of.items()}
    return {name: one.detach().clone() for name, one in tensors.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def victims(job_of):
    """The third and the sixth picture of step 1, by key."""
    found = pictures(job_of(), 1)
    chosen = dict([list(found.items())[2], list(found.items())[5]])
    assert len({round(total, 5) for total in found.values()}) == BATCH, "sums of pixels tell pictures apart"
    return chosen


CASES = {
    "output": ((), "trap", "the output of trap"),
    "gradient": ((), "trap", "the gradient of the input of trap"),
    "loss": (("--loss", "{traps:loss: 1}"), "loss.traps:loss", "the loss traps:loss"),
    "slope": (("--loss", "{traps:slope: 1}"), "loss", "the gradient of the loss"),
}


@pytest.mark.parametrize("micro_batch", ["16", "5"])
@pytest.mark.parametrize("case", CASES)
def test_the_first_layer_and_the_samples_are_named(case, micro_batch, job_of, victims):
    flags, layer, what = CASES[case]
    kind = "loss" if case == "slope" else case
    job = job_of(*flags, "--train.micro-batch", micro_batch, kind=kind, victims=victims.values())
    before = everything(job)
    cause = diagnose(job, 1)
    assert (cause.layer, cause.what, set(cause.samples)) == (layer, what, set(victims))
    assert cause.words == f"{what} is not finite in 2 samples: {', '.join(cause.samples)}"
    assert equal(everything(job), before)
    assert all(one.grad is None for one in job.network.parameters())


def test_grains_of_exact_mode_are_diagnosed_as_well(job_of, victims):
    job = job_of("--train.exact", "true", "--train.grain", "4", victims=victims.values())
    take(job, 0)
    with pytest.raises(Ended, match="step 2: the output of trap is not finite in 2 samples"):
        take(job, 1)


def test_many_samples_are_shown_by_the_first_and_counted(job_of):
    found = pictures(job_of(), 1)
    cause = diagnose(job_of(victims=found.values()), 1)
    assert cause.samples == tuple(found)
    assert cause.words.endswith(
        f"in {BATCH} samples: {', '.join(list(found)[:SHOWN])}, and {BATCH - SHOWN} more"
    )


def test_weights_that_are_not_finite_already_are_the_cause(job_of):
    job = job_of()
    with torch.no_grad():
        job.network.head.weight[1, 1] = math.inf
    cause = diagnose(job, 0)
    assert (cause.words, cause.layer) == ("the weight head.weight is not finite", "head")


def test_what_is_finite_when_it_is_computed_again_is_said_to_be(job_of):
    job = job_of()
    job.network.norm.weight.grad = torch.full((4,), math.inf)
    assert diagnose(job, 0).words == "the gradient of norm.weight, a sum over samples, is not finite"
    assert "when the step is computed again" in diagnose(job, 0).what


@pytest.mark.parametrize("case", ["output", "gradient"])
def test_a_run_that_stops_does_so_before_the_optimizer(case, job_of, victims):
    job = job_of(kind=case, victims=victims.values())
    take(job, 0)
    before = everything(job)
    with pytest.raises(Ended) as end:
        take(job, 1)
    after = everything(job)
    assert (end.value.code, end.value.layer, set(end.value.samples)) == ("NONFINITE", "trap", set(victims))
    assert end.value.what.startswith(f"error: step 2: {CASES[case][2]} is not finite")
    assert "--train.on-nonfinite skip" in end.value.hint
    weights = [name for name in before if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(before[name], after[name]) for name in weights)


@pytest.mark.parametrize("case", ["output", "gradient"])
@pytest.mark.parametrize("flags", [(), ("--train.exact", "true", "--train.grain", "4")])
def test_a_step_that_is_left_out_leaves_nothing_behind(case, flags, job_of, victims):
    """Weights, moments, average and running statistics are those of a run without the step."""
    job = job_of("--train.on-nonfinite", "skip", *flags, kind=case, victims=victims.values())
    taken = take(job, 0, 1)
    assert taken.skipped.startswith(CASES[case][2])
    assert (job.progress.skipped, job.progress.nonfinite_row) == (1, 1)
    take(job, 2, 3)
    assert (job.progress.skipped, job.progress.nonfinite_row) == (1, 0)
    without = job_of(*flags, kind=case)
    take(without, 0, 2, 3)
    assert equal(everything(job), everything(without))


def test_ten_steps_in_a_row_end_the_run_also_where_they_are_left_out(job_of):
    job = job_of("--train.on-nonfinite", "skip")
    all_of_them = [total for step in range(IN_A_ROW + 2) for total in pictures(job, step).values()]
    job = job_of("--train.on-nonfinite", "skip", victims=all_of_them)
    before = everything(job)
    take(job, *range(IN_A_ROW - 1))
    with pytest.raises(Ended, match=f"step 10: {IN_A_ROW} steps in a row were not finite") as end:
        take(job, IN_A_ROW - 1)
    assert end.value.code == "NONFINITE"
    assert "skip" not in end.value.hint
    assert equal(everything(job), before)


def test_a_loss_that_is_infinite_ends_the_run_though_its_gradient_is_finite(job_of, victims):
    flags = CASES["loss"][0]
    job = job_of(*flags, kind="loss", victims=victims.values())
    with pytest.raises(Ended, match="step 2: the loss traps:loss is not finite in 2 samples"):
        take(job, 0, 1)


@pytest.mark.parametrize("limit", [{}, {"clip_norm": 1.0}, {"clip_value": 1.0}, {"clip_adaptive": 0.1}])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_way_of_clipping_hides_what_is_not_finite(limit, number, accelerator):
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    for one in parameters[:2]:
        one.grad = torch.tensor([1.0, 2.0, 3.0])
    assert clip_gradients(accelerator, parameters, OptimConfig(**limit), head=[])
    parameters[1].grad = torch.tensor([5.0, number, 7.0])
    assert not clip_gradients(accelerator, parameters, OptimConfig(**limit), head=[])
    expected = torch.tensor([5.0, number, 7.0])
    assert torch.equal(parameters[1].grad.nan_to_num(), expected.nan_to_num())


def test_weights_and_statistics_that_are_not_finite_are_not_saved(job_of):
    job = job_of()
    check_weights(job)
    with torch.no_grad():
        job.network.first.weight.mul_(1e30)  # its norm is beyond float32, its numbers are not
    check_weights(job)
    for broken, layer in ((job.network.norm.running_var, "norm"), (job.network.head.bias.data, "head")):
        kept = broken.clone()
        broken[0] = math.nan
        with pytest.raises(Ended, match=f"not saved: {layer}.") as end:
            check_weights(job)
        assert (end.value.code, end.value.layer) == ("NONFINITE", layer)
        broken.copy_(kept)


class Stateful(torch.nn.Module):
    """Buffers of several types, one of which is put in another's place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.randn(3))
        self.register_buffer("turned", torch.randn(4, 5).t())
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("seen", torch.tensor([True, False]))
        self.register_buffer("none", None)

    def advance(self):
        self.turned.add_(1)
        self.count += 1
        self.seen.logical_not_()
        self.mean = self.mean * torch.nan


def test_buffers_get_their_values_back_and_their_places():
    module = torch.nn.Sequential(Stateful(), torch.nn.BatchNorm1d(3))
    values, tensors = {n: b.clone() for n, b in module.named_buffers()}, dict(module.named_buffers())
    copies = BufferCopies(module)
    module[0].advance()
    module[1](torch.full((2, 3), torch.inf))
    assert not torch.equal(module[1].running_mean, values["1.running_mean"])
    copies.put_back()
    assert dict(module.named_buffers()).keys() == values.keys()
    for name, buffer in module.named_buffers():
        assert buffer is tensors[name]
        assert torch.equal(buffer, values[name]), name


def test_rows_of_windows_belong_to_the_sample_that_they_are_of():
    windows = torch.zeros(6, 4, 2)
    windows[3, 1, 1] = torch.nan
    assert rows_not_finite(windows, 3) == [1]
    assert rows_not_finite({"all": [torch.tensor(torch.inf)]}, 3) == [0, 1, 2]
    assert rows_not_finite((torch.zeros(3, 2), torch.tensor([0.0, torch.inf, torch.inf])), 3) == [1, 2]


class Bare(torch.nn.Module):
    """What is not finite arises between two layers, in arithmetic of the module around them."""

    def __init__(self, between):
        super().__init__()
        self.first = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(inplace=True))
        self.last = torch.nn.Linear(3, 1)
        self.between = between

    def forward(self, x):
        return self.last(self.between(self.first(x)))


def test_what_arises_between_layers_is_not_blamed_on_the_next_one():
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), Bare(lambda x: (x - 1e9).log()))
    watch = ForwardWatch(2)
    with watch.over(network):
        network(torch.ones(2, 3))
    assert watch.culprit == ("1", 5, [0, 1], "output")
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), Bare(lambda x: (x * 0).sqrt()))
    for layers in (network, network[1]):
        backward = BackwardWatch(2)
        with backward.over(layers):
            layers(torch.ones(2, 3)).sum().backward()
        # Where the outer module's input has no gradient, all that can be told is behind which layer it is.
        assert backward.culprit[0::3] == (("1", "input") if layers is network else ("first.1", "output"))
    assert all(not one._forward_hooks and not one._forward_pre_hooks for one in network.modules())


def test_the_plot_of_losses_leaves_gaps(tmp_path):
    losses = [1.0, None, 0.5]
    lines = [
        json.dumps({"kind": "train", "step": n, "loss": one, "lr": 0.1}) + "\n"
        for n, one in enumerate(losses)
    ]
    lines.append(json.dumps({"kind": "eval", "step": 2, "metrics": {"loss": None, "accuracy": 0.5}}) + "\n")
    for part in (lines, [lines[1]]):
        (tmp_path / "metrics.jsonl").write_text("".join(part))
        draw_plots(tmp_path)
        assert (tmp_path / "plots" / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "segmentation"])
def test_an_evaluation_of_a_network_that_gives_nan_is_plain_json(task, request, accelerator):
    roots = {
        "multiclass": "photo_dataset",
        "multilabel": "multilabel_dataset",
        "segmentation": "segmentation_dataset",
    }
    size = "[{resize_to: {height: 16, width: 16}}]"
    name = (
        ["unet", "--model.arguments", "{width: 4, depth: 2}"] if task == "segmentation" else ["test_resnet"]
    )
    words = ["--data.root", str(request.getfixturevalue(roots[task])), "--task", task, "--model.name", *name]
    words += ["--data.train-transforms", size, "--data.eval-transforms", size, "--data.workers", "0"]
    asked = read_request([*words, "--train.global-batch", "6", "--run-dir", "unused"])
    dataset = open_dataset(asked.config, learning=True)
    job = assemble(asked, accelerator, dataset, checkpoint=None, progress=Progress())
    job.network.register_forward_hook(lambda _module, _given, out: out * torch.nan)
    scores = evaluate(Examined(job.network, job.task, job.config, dataset, accelerator, job.normalizer))
    assert scores.metrics["loss"] is None
    assert json.loads(json.dumps(scores.as_json(), allow_nan=False))["certificate"]["seen"] > 0


TWO = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_nonfinite as here
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)

def make(victims, *flags):
    flags = ["--train.micro-batch", "4", *flags]
    job = here.job_with(accelerator, sys.argv[2], *flags, kind="output", victims=victims)
    job.learn()
    return job

plain = make([])
mine = list(here.pictures(plain, 1).items())
# Of the second process's samples alone, which is told to nobody.
victims = [total for _, total in mine[2:4]] if accelerator.process_index == 1 else []
trapped = make(victims, "--train.on-nonfinite", "skip")
here.take(plain, 0, 2, 3)
here.take(trapped, 0, 1, 2, 3)
assert here.equal(here.everything(trapped), here.everything(plain))
assert trapped.progress.skipped == 1
said = []
# Layers that talk to one another spread it to the other process before anybody looks.
for sync in ("false", "true"):
    try:
        here.take(make(victims, "--train.sync-batchnorm", sync), 1)
    except here.Ended as end:
        said.append({"samples": end.samples, "layer": end.layer})
with open(f"said-{accelerator.process_index}.json", "w") as file:
    json.dump([*said, [key for key, _ in mine[2:4]]], file)
accelerator.wait_for_everyone()
"""


@pytest.mark.slow
def test_what_one_process_alone_meets_all_leave_out_and_name_alike(digits, traps, execute, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    (tmp_path / "traps.py").write_text(TRAPS)
    command = [BIN / "torchrun", "--nproc_per_node=2", "two.py", Path(__file__).parent, digits]
    done = execute(command)
    assert done.returncode == 0, done.stderr
    zero, one = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1))
    told = {"samples": one[2], "layer": "trap"}
    assert zero[:2] == one[:2] == [told, told]
    assert zero[2] != one[2]


@pytest.fixture
def flags(digits, traps, job_of):
    """Of a run that meets what is not finite in its third step; and the keys of the samples."""
    found = list(pictures(job_of(), 2).items())[9:11]
    arguments = json.dumps({"victims": [total for _, total in found]})
    words = ["--data.root", digits, "--data.train-transforms", "[]", "--model.name", "traps:Net"]
    words += ["--model.arguments", arguments, "--train.global-batch", BATCH, "--train.max-steps", 5]
    words += ["--checkpoint.every-steps", 2, "--run-dir", "run", "--tracking.wandb", "offline"]
    return words, sorted(key for key, _ in found)


def records(run_dir, kind="train"):
    def never(word):
        raise AssertionError(f"{word} is no JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=never) for line in lines]
    return [one for one in found if one["kind"] == kind]


@pytest.mark.slow
def test_a_whole_run_stops_at_the_step_and_another_start_leaves_it_out(flags, traps, execute, tmp_path):
    """On two processes, of which the second has the samples."""
    words, keys = flags
    (tmp_path / "traps.py").write_text(TRAPS)
    command = [BIN / "torchrun", "--nproc_per_node=2", ROOT / "training" / "run.py", *words]
    done = execute(command)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "error: step" in line]
    assert len(said) == 1, done.stderr
    assert "step 3: the output of trap is not finite in 2 samples: " in said[0]
    assert done.stderr.count("FATAL code=NONFINITE rank=0 ") == 1
    assert (
        "Traceback" not in done.stderr.replace("torch.distributed.elastic", "")[: done.stderr.index("FATAL")]
    )
    content = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert (content["code"], content["step"], content["layer"]) == ("NONFINITE", 3, "trap")
    assert sorted(content["samples"]) == keys
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000002"]
    assert [one["step"] for one in records(tmp_path / "run")][:1] == [1]

    done = execute([sys.executable, ROOT / "training" / "run.py", *words, "--train.on-nonfinite", "skip"])
    assert done.returncode == 0, done.stderr
    assert "step 3 is left out: the output of trap is not finite in 2 samples: " in done.stdout
    assert "left out  1 step: not finite" in done.stdout
    told = {one["step"]: one for one in records(tmp_path / "run")}
    assert sorted(told) == [1, 2, 3, 4, 5]
    assert (told[3]["loss"], told[3]["skipped"]) == (None, "nonfinite")
    assert all(told[step]["loss"] > 0 and "skipped" not in told[step] for step in (1, 2, 4, 5))
    newest = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert json.loads((newest / "state.json").read_text())["progress"]["skipped"] == 1
    assert all(one.isfinite().all() for one in load_file(newest / "model.safetensors").values())
