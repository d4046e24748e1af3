"""What `lockstep launch` takes: a frozen set of options, read from the command line and checked together."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

from data_pipeline.fault import UserError
from launch.arguments import EXAMPLE, PORT, arguments
from launch.arguments import LAUNCHERS as LAUNCHERS

SLURM_ONLY = ("gpus", "cpus", "time", "partition", "account", "qos", "job_name", "signal_seconds", "array")


@dataclass(frozen=True)
class Options:
    """One call of `lockstep launch`, but for the arguments of training/run.py."""

    nodes: int = 1
    """machines"""
    node_rank: int = 0
    """number of this machine, from 0"""
    address: str | None = None
    """host of node 0, as the others reach it"""
    port: int = PORT
    """port there; the processes meet at ports that are free"""
    processes_per_node: int | None = None
    """None: one for each GPU, one where there is none"""
    cpu: bool = False
    """no GPU is used, also where there are some"""
    launcher: str = LAUNCHERS[0]
    """what starts the processes: we ourselves, accelerate or torchrun; --with"""
    max_restarts: int = 0
    """how often all processes are started again after a failure"""
    min_nodes: int | None = None
    """machines that are enough for another start; None: all"""
    wait: float = 15.0
    """seconds for the missing to come"""
    dry_run: bool = False
    """print the commands, start nothing"""
    slurm: bool = False
    """submit to SLURM"""
    gpus: int | None = None
    """GPUs of each node"""
    cpus: int | None = None
    """cores of each process"""
    time: str | None = None
    """time limit as SLURM reads it"""
    partition: str | None = None
    """SLURM's partition"""
    account: str | None = None
    """SLURM's account"""
    qos: str | None = None
    """SLURM's quality of service"""
    job_name: str | None = None
    """the job's name"""
    signal_seconds: int = 300
    """how long before the time limit the job is told to save and stop"""
    array: str | None = None
    """numbers of an array of jobs: 0-5%2"""
    sbatch: tuple[str, ...] = ()
    """lines for the #SBATCH block, as they are"""
    follow: str | None = None
    """show a job's output until it is over: the one that is submitted, or "JOB"; "" is the newest"""
    by_hand: bool = False
    """whether --nodes or --with was said: then a SLURM job around it does not decide"""

    @property
    def least_nodes(self) -> int:
        """Machines that are enough for another start."""
        return self.nodes if self.min_nodes is None else self.min_nodes


def parse(argv: list[str]) -> tuple[Options, list[str]]:
    """The options before `--`, and the arguments of training/run.py behind it; USAGE.

    Ends the process where the help was asked for.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    said, words = argv[:cut], argv[cut + 1 :]
    try:
        parsed = vars(arguments().parse(said))
    except UserError as error:
        if _belongs_behind(said):
            mend = f"arguments of training/run.py follow a double dash: {EXAMPLE}"
            raise UserError(error.what, mend=mend, code="USAGE") from None
        raise
    by_hand = any(parsed[name] is not None for name in ("nodes", "launcher"))
    given: dict[str, Any] = {name: value for name, value in parsed.items() if value is not None}
    options = Options(**given | {"sbatch": tuple(given["sbatch"]), "by_hand": by_hand})
    _check(options, parsed)
    return options, words


def _belongs_behind(said: list[str]) -> bool:
    """Whether a word of training/run.py stands before the double dash, or where there is none."""
    return any(
        re.match(r"--\w+\.|--(config|run-dir|fresh|seed)\b|(train|evaluate|predict)$", w) for w in said
    )


def _check(options: Options, said: dict[str, Any]) -> None:
    """USAGE where options contradict one another; both values are named."""
    faults = []
    if options.node_rank >= options.nodes:
        faults.append(f"--node-rank {options.node_rank} --nodes {options.nodes}: nodes count from 0")
    if options.least_nodes > options.nodes:
        faults.append(f"--min-nodes {options.min_nodes} --nodes {options.nodes}: more than there are")
    if options.nodes > 1 and not options.slurm:
        if options.address is None:
            faults.append(f"--nodes {options.nodes}: --address is missing, the host of node 0")
        faults += _agent_faults(options) if options.launcher != "lockstep" else []
    if options.slurm:
        names = {"node_rank": "--node-rank", "address": "--address", "port": "--port", "launcher": "--with"}
        faults += [
            f"{flag} {said[name]} --slurm: SLURM decides that" for name, flag in names.items() if said[name]
        ]
    else:
        raw = [*SLURM_ONLY, "sbatch", "follow"]
        faults += [
            f"{_flag(name)}{_value(said[name])} without --slurm"
            for name in raw
            if said[name] not in (None, False, [])
        ]
    if options.cpu and options.gpus:
        faults.append(f"--cpu --gpus {options.gpus}: one or the other")
    if faults:
        raise UserError(
            "\n".join(faults), mend="lockstep launch --help says what goes together", code="USAGE"
        )


def _agent_faults(options: Options) -> list[str]:
    """Agents of different machines do not hear of one another's restarts through us."""
    said = {"--max-restarts": options.max_restarts, "--min-nodes": options.min_nodes}
    return [
        f"{flag} {value} --with {options.launcher} --nodes {options.nodes}: only --with lockstep does that"
        for flag, value in said.items()
        if value
    ]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _value(value: object) -> str:
    return "" if value is True else f" {shlex.join(value) if isinstance(value, list) else value}"
