"""Everything that a running training holds, and what the passing of steps does to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3

from data_pipeline.index import DatasetIndex
from data_pipeline.plan import Plan
from training.command import Request
from training.config import Config
from training.exact.grain_sums import GrainSums
from training.freezing import Freezing, apply_freezing, train_mode
from training.gradient_sums import add_up_gradients
from training.inputs import Normalizer, pixel_statistics
from training.losses import Labels
from training.networks.pretrained import LoadReport
from training.networks.synced_batch_norm import Presence
from training.process import Place
from training.schedules import RunLength, rate_at
from training.state import Progress
from training.stopwatch import Stopwatch
from training.tasks.task import Task


@dataclass
class Job:
    """`model` is wrapped for the processes, `network` the bare one in it, `average` the mean of its past."""

    request: Request
    accelerator: Accelerator
    dataset: DatasetIndex
    plan: Plan
    task: Task
    labels: Labels
    freezing: Freezing
    model: torch.nn.Module
    network: torch.nn.Module
    average: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    names: list[str]  # of the optimizer's parameters
    head: frozenset[str]  # names of the parameters that make the outputs
    progress: Progress
    loaded: LoadReport | None = None  # what came from pretrained weights
    place: Place = field(default_factory=Place)  # where this process is, for its last words
    watch: Stopwatch = field(default_factory=Stopwatch)
    presence: Presence = field(default_factory=Presence)  # for BatchNorm that is synchronised
    grain_sums: GrainSums | None = None  # in exact mode, from the first batch on

    @property
    def config(self) -> Config:
        """What the run was told."""
        return self.request.config

    @cached_property
    def length(self) -> RunLength:
        """What durations are measured by, and how many steps the learning rate's course spans."""
        return length_of(self.config, self.plan)

    @property
    def last_step(self) -> int:
        """Optimizer steps after which the run ends."""
        return min(self.length.steps, self.config.train.max_steps or self.length.steps)

    @property
    def weights_every_steps(self) -> int:
        """Optimizer steps between weights that are kept for good; 0: never."""
        return (self.config.checkpoint.weights_every_epochs or 0) * self.plan.steps_per_epoch

    @cached_property
    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation per channel of pixels scaled to 0..1."""
        return pixel_statistics(self.config, self.dataset)

    @cached_property
    def normalizer(self) -> Normalizer:
        """Makes the network's inputs of batches."""
        layout = self.config.model.channels_last
        return Normalizer(*self.pixel_statistics, self.accelerator.device, channels_last=layout)

    @cached_property
    def known_slopes(self) -> torch.Tensor:
        """The objective's slopes where they are the same for every global batch."""
        objective, samples = self.task.objective, self.config.train.global_batch
        return objective.slopes(objective.known_counts(samples)).to(self.accelerator.device)

    @cached_property
    def head_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that make the outputs."""
        return [parameter for name, parameter in self.network.named_parameters() if name in self.head]

    @cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those of the network; walking through a large one takes a millisecond."""
        return list(self.network.parameters())

    @property
    def scored(self) -> torch.nn.Module:
        """The network that is evaluated and taken away: the averaged one where there is one."""
        return self.network if self.average is None else self.average.module

    def rate(self, step: int, peak: float) -> float:
        """Learning rate of optimizer step `step` (from 0) for parameters whose highest is `peak`."""
        return rate_at(step, peak, self.config.optim, self.length, drops=self.progress.plateau.factor)

    def set_rates(self, step: int) -> None:
        """Give each parameter group its rate for optimizer step `step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step, group["peak_lr"])

    def learn(self) -> None:
        """Put the network into training mode, but for what is frozen."""
        train_mode(self.network, self.freezing.frozen_at(self.progress.step))

    def thaw(self, step: int) -> None:
        """From optimizer step `step` on, more of the network learns; every process comes here.

        DDP fixes at its construction which gradients it reduces, so it is built anew; the old one must be
        gone first, or its hooks would fire beside the new one's.
        """
        accelerator = self.accelerator
        accelerator._models = [model for model in accelerator._models if model is not self.model]
        self.model = accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        apply_freezing(self.network, self.freezing.frozen_at(step))
        train_mode(self.network, self.freezing.frozen_at(step))
        self.grain_sums = None
        self.model = accelerator.prepare_model(self.network, evaluation_mode=self.config.train.exact)
        add_up_gradients(self.model, self.watch)


def length_of(config: Config, plan: Plan) -> RunLength:
    """How long a run is: `epochs` fix the course of the learning rate, else `max_steps` does."""
    train = config.train
    steps = train.epochs * plan.steps_per_epoch if train.epochs else train.max_steps or 0
    return RunLength(steps, plan.steps_per_epoch, train.global_batch)
