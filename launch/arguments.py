"""The words that `lockstep launch` takes before the double dash, one by one, and their help."""

from __future__ import annotations

import argparse
import math
import re

from data_pipeline.command_line import Parser, whole

LAUNCHERS = ("lockstep", "accelerate", "torchrun")
PORT = 29400  # where the launchers of several machines meet
EXAMPLE = "lockstep launch --processes-per-node 2 --cpu -- --train.max-steps 20"


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


def arguments() -> Parser:
    """What argparse knows of them; what was not said is None."""
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
