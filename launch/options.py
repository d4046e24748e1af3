"""What `lockstep launch` takes: a frozen set of options, read from the command line and checked together."""

from __future__ import annotations

import argparse
import math
import re
import shlex
from dataclasses import dataclass
from typing import Any

from data_pipeline.command_line import Parser, whole
from data_pipeline.fault import UserError

LAUNCHERS = ("lockstep", "accelerate", "torchrun")
PORT = 29400  # where the launchers of several machines meet
SLURM_ONLY = ("gpus", "cpus", "time", "partition", "account", "qos", "job_name", "signal_seconds", "array")
EXAMPLE = "lockstep launch --processes-per-node 2 --cpu -- --train.max-steps 20"


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
        parsed = vars(_parser().parse(said))
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


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to 86400")
    return seconds


def _host(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._:%-]{1,253}", text) or text.startswith("-"):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no host name or address")
    return text


def _parser() -> Parser:
    parser = Parser(
        prog="lockstep launch",
        usage="lockstep launch [options] -- [train|evaluate|predict] [arguments of training/run.py]",
        description="Start training on this machine, on several machines, or in SLURM. Inside of a SLURM job "
        "it starts a process for each GPU, or task, of the job. What follows the double dash is handed to "
        "training/run.py; -- --help shows that.",
        epilog=f"Example: {EXAMPLE}",
        allow_abbrev=False,
    )
    _add_processes(parser)
    _add_machines(parser)
    _add_slurm(parser)
    return parser


def _add_processes(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--processes-per-node",
        type=whole(1, 4096),
        metavar="P",
        help="processes on each machine (one for each GPU, else one)",
    )
    add("--cpu", action="store_true", help="use no GPU, also where there are some")
    add(
        "--max-restarts",
        type=whole(0, 10**6),
        metavar="N",
        help="after a failure, start again from the newest checkpoint, N times at most (0)",
    )
    add(
        "--wait",
        type=_seconds,
        metavar="SECONDS",
        help="how long those that are there wait for the rest (15)",
    )
    add("--with", dest="launcher", choices=LAUNCHERS, help="what starts the processes (lockstep)")
    add("--dry-run", action="store_true", help="print the commands, or SLURM's script, and start nothing")


def _add_machines(parser: Parser) -> None:
    about = (
        "Give the same command on each. LOCKSTEP_TOKEN, if set, is a secret that all of them have to know."
    )
    add = parser.add_argument_group("several machines", about).add_argument
    add("--nodes", type=whole(1, 1 << 17), metavar="N", help="number of machines (1)")
    add("--node-rank", type=whole(0, 1 << 17), metavar="R", help="which of them this is, from 0 (0)")
    add("--address", type=_host, metavar="HOST", help="host of node 0, as the others reach it")
    add("--port", type=whole(1, 65535), metavar="PORT", help=f"port there ({PORT})")
    add(
        "--min-nodes",
        type=whole(1, 1 << 17),
        metavar="M",
        help="after a failure go on with M machines, if no more come (all)",
    )


def _add_slurm(parser: Parser) -> None:
    add = parser.add_argument_group("SLURM").add_argument
    add("--slurm", action="store_true", help="submit a job of --nodes machines that is requeued until done")
    add("--gpus", type=whole(1, 64), metavar="G", help="GPUs of each machine")
    add("--cpus", type=whole(1, 4096), metavar="C", help="cores of each process")
    for name in ("time", "partition", "account", "qos", "job-name"):
        add(f"--{name}", metavar=name.partition("-")[2].upper() or name.upper(), help=f"sbatch's --{name}")
    add(
        "--signal-seconds",
        type=whole(1, 86400),
        metavar="SECONDS",
        help="save and stop so long before the time limit (300)",
    )
    add("--array", metavar="NUMBERS", help="an array of jobs: 0-5%%2")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help='any other option of sbatch: --sbatch="--constraint=a100"; may be given again',
    )
    add("--follow", nargs="?", const="", metavar="JOB", help="show the job's output, or JOB's, to its end")
