"""Names what held a run up, and what to change: a pure function of the seconds that its processes counted.

The processes walk in step, so the one that waits least for the others sets the pace: its seconds are those
of the run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

from training.config import Config
from training.stopwatch import PARTS

WORTH_TELLING = 0.05  # share of the whole time; what is less goes into the rest
TELL = 3  # parts at most
BEHIND = 0.1  # by how much of its steps' time a process differs that holds the others up

NAMES = {
    "data": "waiting for data",
    "copy": "preparing batches",
    "compute": "computing",
    "reduce": "reducing",
    "optimizer": "updating",
    "checkpoint": "saving",
    "other": "bookkeeping",
    "evaluation": "evaluating",
    "start": "starting",
}
# Share of the time of steps from which a part is the bottleneck, and no longer computing, which a run is
# for; so is updating weights. An evaluation's share is one of steps and evaluations together.
TOO_MUCH = {
    "data": 0.1,
    "copy": 0.1,
    "reduce": 0.15,
    "optimizer": 0.3,
    "checkpoint": 0.1,
    "other": 0.1,
    "evaluation": 0.25,
}
# By what a process can be behind the others, and where to look.
LOOK_AT = {
    "data": "its disk, network and free cores",
    "copy": "its free cores, and its way to the device",
    "compute": "its device, the clock rate, and what else runs there",
}


class Spent(NamedTuple):
    """What one process did with its time."""

    host: str
    seconds: Mapping[str, float]  # by stopwatch.PARTS and BESIDE

    @property
    def steps(self) -> float:
        """Seconds of all its optimizer steps."""
        return sum(self.seconds[part] for part in PARTS)


class Machine(NamedTuple):
    """What a process has to work with."""

    device: str  # torch's name of its kind: cpu, cuda
    processes: int  # of the run
    cores: int  # *per process*
    threads: int  # that compute, *per process*


def account(everyone: list[Spent], config: Config, machine: Machine) -> list[str]:
    """What the time of a start went into, and its bottleneck: a line each, none where no step was taken."""
    pace = min(everyone, key=lambda one: one.seconds["reduce"])
    if pace.steps == 0:
        return []
    bottleneck = _straggler(everyone, everyone.index(pace)) or _bottleneck(pace, config, machine)
    return [f"time      {_overview(pace.seconds)}", f"          {bottleneck}"]


def _overview(seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values())
    shares = sorted(((spent / total, NAMES[part]) for part, spent in seconds.items()), reverse=True)
    told = [(share, name) for share, name in shares if share >= WORTH_TELLING][:TELL]
    rest = 1 - sum(share for share, _ in told)
    told += [(rest, "rest")] if rest >= 0.005 else []
    return f"{_duration(total)}: " + ", ".join(f"{_percent(share)} {name}" for share, name in told)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _straggler(everyone: list[Spent], rank: int) -> str | None:
    """The process that sets the pace, where it needs much more of its time for something than the others."""
    others = [one for number, one in enumerate(everyone) if number != rank and one.steps > 0]
    if not others:
        return None
    slow = everyone[rank]
    own = {part: slow.seconds[part] / slow.steps for part in LOOK_AT}
    usual = {part: statistics.median(one.seconds[part] / one.steps for one in others) for part in LOOK_AT}
    part = max(LOOK_AT, key=lambda one: own[one] - usual[one])
    if own[part] - usual[part] < BEHIND:
        return None
    return (
        f"bottleneck: process {rank} on {slow.host}, {_percent(own[part])} {NAMES[part]}, the others "
        f"{_percent(usual[part])}; look at {LOOK_AT[part]}"
    )


def _bottleneck(pace: Spent, config: Config, machine: Machine) -> str:
    shares = {part: pace.seconds[part] / pace.steps for part in PARTS}
    shares["evaluation"] = pace.seconds["evaluation"] / (pace.steps + pace.seconds["evaluation"])
    too_much = [part for part in TOO_MUCH if shares[part] >= TOO_MUCH[part]]
    part = max(too_much, key=lambda one: shares[one], default="compute")
    as_it_should = ", as it should be" if part == "compute" else ""
    return f"bottleneck: {NAMES[part]}{as_it_should}; {ADVICE[part](config, machine)}"


def _data(config: Config, machine: Machine) -> str:
    workers, location = config.data.workers, config.data.location
    nearer = f", or bring {location} nearer" if "://" in location else ""
    if workers == 0 or workers < machine.cores:
        return f"raise --data.workers ({workers} now, {_cores(machine)}){nearer}"
    return f"all of {_cores(machine)} read: lockstep pack --resize-shorter, or cheaper transforms{nearer}"


def _cores(machine: Machine) -> str:
    cores = f"{machine.cores} core{'s' * (machine.cores > 1)}"
    return cores if machine.processes == 1 else f"{cores} a process"


def _copy(config: Config, machine: Machine) -> str:
    if machine.device == "cpu":
        return "crop smaller pictures"
    return "crop smaller pictures, or start fewer processes on a machine"


def _reduce(config: Config, machine: Machine) -> str:
    exact = ", or leave --train.exact" if config.train.exact else ""
    return f"{_larger(config)}, or start fewer processes ({machine.processes} now){exact}"


def _larger(config: Config) -> str:
    return f"raise --train.global-batch ({config.train.global_batch} now)"


def _optimizer(config: Config, machine: Machine) -> str:
    fusable = config.optim.name in ("sgd", "adam", "adamw") and not config.optim.arguments
    if machine.device == "cpu" and fusable:
        return "set --optim.arguments '{fused: true}'"
    return f"{_larger(config)}, or use a simpler rule than {config.optim.name}"


def _checkpoint(config: Config, machine: Machine) -> str:
    for name in ("every_steps", "every_minutes", "every_epochs"):
        if (every := getattr(config.checkpoint, name)) is not None:
            return f"raise --checkpoint.{name.replace('_', '-')} ({every:g} now)"
    return _evaluation(config, machine)


def _other(config: Config, machine: Machine) -> str:
    if config.debug.batch_digest != "none":
        return "leave --debug.batch-digest"
    return f"{_larger(config)} or --log.every-steps ({config.log.every_steps} now)"


def _evaluation(config: Config, machine: Machine) -> str:
    return f"raise --eval.every-epochs ({config.eval.every_epochs} now)"


def _compute(config: Config, machine: Machine) -> str:
    if machine.device == "cpu" and machine.threads < machine.cores:
        return f"use a GPU, or OMP_NUM_THREADS={machine.cores} ({machine.threads} now)"
    if machine.device == "cpu":
        return "use a GPU, or more machines"
    untried = {
        "--train.precision bf16": config.train.precision == "fp32",
        "--model.channels-last": not config.model.channels_last,
        "--model.compile": not config.model.compile,
    }
    flags = [flag for flag, sensible in untried.items() if sensible]
    return f"try {', '.join(flags)}" if flags else "use more GPUs"


# What to change, by the part that is the bottleneck.
ADVICE: dict[str, Callable[[Config, Machine], str]] = {
    "data": _data,
    "copy": _copy,
    "compute": _compute,
    "reduce": _reduce,
    "optimizer": _optimizer,
    "checkpoint": _checkpoint,
    "other": _other,
    "evaluation": _evaluation,
}
