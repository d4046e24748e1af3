"""The gradient of a global batch: what is looked at twice for it, and what the processes do together."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

from data_pipeline.fault import UserError
from training.assembly import assemble
from training.command import read_request
from training.gradients import accumulate
from training.reading import open_dataset, training_batches
from training.reduction import settle_reduction
from training.state import Progress

SIZE = "[{resize_to: {height: 24, width: 24}}]"
PIXELS = ["--task", "segmentation", "--loss", "dice", "--train.global-batch", "14", "--model.name", "unet"]
UNET = [*PIXELS, "--model.arguments", "{width: 4, depth: 2}"]
BARE_UNET = [*PIXELS, "--model.arguments", "{width: 4, depth: 2, norm: false}"]


def request_of(root, *words):
    common = ["--data.train-transforms", SIZE, "--data.workers", "0", "--run-dir", "unused"]
    return read_request(["--data.root", str(root), *common, *words])


def job_of(request, accelerator):
    dataset = open_dataset(request.config, learning=True)
    job = assemble(request, accelerator, dataset, checkpoint=None, progress=Progress())
    job.learn()
    return job


def stream_of(job, config=None, *, step=0):
    steps = range(step, step + 1)
    return training_batches(config or job.config, job.dataset, job.plan, job.accelerator, steps=steps)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def test_looking_ahead_leaves_running_statistics_as_one_pass_would(segmentation_dataset, accelerator):
    words = [*UNET, "--train.micro-batch", "5"]
    networks = []
    for loss in ("dice", "cross_entropy"):
        job = job_of(request_of(segmentation_dataset, *words, "--loss", loss), accelerator)
        accumulate(job, stream_of(job, step=1), 1)
        networks.append(job.network)
    overlapping, plain = networks
    buffers = dict(plain.named_buffers())
    assert len(buffers) > 0
    for name, buffer in overlapping.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_dropout_is_the_same_when_a_batch_is_looked_at_twice(segmentation_dataset, accelerator):
    """Else the gradient would be that of areas that no pass has seen."""
    job = job_of(request_of(segmentation_dataset, *BARE_UNET, "--train.micro-batch", "14"), accelerator)
    seen = []

    def noisy(_module, _arguments, output):
        dropped = torch.nn.functional.dropout(output, 0.5)
        seen.append(dropped.detach())
        return dropped

    job.network.register_forward_hook(noisy)
    config = request_of(segmentation_dataset, *BARE_UNET, "--train.micro-batch", "5").config
    accumulate(job, stream_of(job, config), 0)
    assert len(seen) == 6
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(first, second)


TOGETHER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_gradients as here
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
found = getattr(here, sys.argv[3])(accelerator, sys.argv[2])
Path(f"found-{accelerator.process_index}.json").write_text(json.dumps(found))
accelerator.wait_for_everyone()
"""


@pytest.fixture
def together(execute, tmp_path, segmentation_dataset):
    """`together(function)`: what `function(accelerator, root)` of this module gives in two processes."""

    def call(function):
        (tmp_path / "together.py").write_text(TOGETHER)
        torchrun = Path(sys.executable).parent / "torchrun"
        words = [Path(__file__).parent, segmentation_dataset, function.__name__]
        done = execute([torchrun, "--nproc_per_node=2", "together.py", *words])
        assert done.returncode == 0, done.stderr
        return [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2)]

    return call


STEPS = 2


def count_reductions(accelerator, root):
    """In steps of four micro-batches: float32 numbers that were added up, passes, what time went into."""
    late = ["--model.freeze", "[first]", "--model.unfreeze", "{first: 1st}"]
    job = job_of(request_of(root, *BARE_UNET, *late, "--train.micro-batch", "2"), accelerator)
    settle_reduction(job, next(stream_of(job)))
    job.thaw(1)  # the wrapper of before must not add anything up any more
    settle_reduction(job, next(stream_of(job)))
    all_reduce, sent, passes = dist.all_reduce, [], []

    def counted(tensor, *arguments, **named):
        sent.append(tensor.numel() if tensor.dtype == torch.float32 else 0)
        return all_reduce(tensor, *arguments, **named)

    dist.all_reduce = counted
    job.network.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    parts, switch = [], job.watch.switch
    job.watch.switch = lambda part: (parts.append(part), switch(part))
    for step in range(STEPS):
        accumulate(job, stream_of(job, step=step), step)
    dist.all_reduce = all_reduce
    sizes = [one.numel() for one in job.network.parameters()]
    return {
        "sent": sum(sent),
        "passes": passes.count(True),
        "parameters": sum(sizes),
        "last": parts[-2:],
    }


@pytest.mark.slow
def test_processes_add_up_their_gradients_once_a_step_however_many_micro_batches_it_has(together):
    for found in together(count_reductions):
        assert found["passes"] == 4 * STEPS
        assert found["sent"] == found["parameters"] * STEPS
        assert found["last"] == ["compute", "reduce"]


# An encoder that goes deeper than its decoder looks.
TOO_DEEP = [*PIXELS, "--model.name", "smp/Unet", "--model.arguments"]
TOO_DEEP += ["{encoder_name: mobilenet_v2, encoder_depth: 2, decoder_channels: [8, 4]}"]


def train_with_unused_parameters(accelerator, root):
    """What comes of it; a user mends it with the words of the refusal, and takes two steps."""
    job = job_of(request_of(root, *TOO_DEEP), accelerator)
    try:
        settle_reduction(job, next(stream_of(job)))
    except UserError as error:
        option, value = shlex.split(error.mend.partition(": ")[2])
        job = job_of(request_of(root, *TOO_DEEP, option, value), accelerator)
        settle_reduction(job, next(stream_of(job)))
        refusal = [error.code, error.what, error.mend]
    else:
        refusal = []
    for step in range(STEPS):
        accumulate(job, stream_of(job, step=step), step)
    return refusal


@pytest.mark.slow
def test_several_processes_refuse_parameters_that_the_forward_pass_does_not_use(together):
    for code, what, mend in together(train_with_unused_parameters):
        assert code == "CONFIG"
        assert "encoder.features.4, encoder.features.5, " in what
        assert "encoder.features.3" not in what
        assert "--model.freeze '[encoder.features.4, encoder.features.5, " in mend


def test_a_single_process_leaves_parameters_that_are_not_used_as_they_are(segmentation_dataset, accelerator):
    assert train_with_unused_parameters(accelerator, segmentation_dataset) == []
