"""Starts the processes of one machine, watches over them, and starts them again where that was asked for."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace

from data_pipeline.command_line import counted, say
from launch.attempts import Outcome
from launch.children import Children, Others, Plan, see_out
from launch.command import LAUNCHERS as COMMANDS
from launch.command import Command, process_commands
from launch.ends import outcome_of, outcome_of_agent
from launch.gpus import count_gpus, wants_cpu
from launch.options import LAUNCHERS, Options
from launch.starts import PROGRAM, Starts
from launch.stop_signals import StopSignals
from launch.ties import GRACE, LAUNCHER, die_with_parent
from launch.topology import LOOPBACK, Topology
from training.command import Request
from training.config import UserError

BACKLOG = 4096  # connections that wait to be taken: all processes come at once

Once = Callable[[Topology, Starts, StopSignals], Outcome]


def run_node(options: Options, request: Request, words: list[str]) -> int:
    """Start training on this machine and see it out; the exit code. USAGE where it cannot be as asked."""
    here = this_machine(options)
    starts = Starts(options, request, words)
    if options.launcher == LAUNCHERS[0]:
        check_expected(request, here.world)
        return start_again(options, here, starts, start_here)
    topology = replace(here, processes=here.processes * options.nodes, node_rank=options.node_rank)
    check_expected(request, topology.world)
    if options.nodes == 1 and not options.dry_run:
        with socket.create_server((LOOPBACK, 0)) as free:
            topology = replace(topology, port=free.getsockname()[1])
    return start_again(options, topology, starts, start_agent)


def this_machine(options: Options) -> Topology:
    """What this machine starts: a process for each GPU, unless options say; USAGE where it has too few."""
    address = options.address or LOOPBACK
    if options.cpu or wants_cpu():
        return Topology((options.processes_per_node or 1,), address=address, port=options.port, cpu=True)
    gpus = count_gpus()
    processes = options.processes_per_node or max(1, gpus)
    if processes > max(1, gpus):
        raise UserError(
            f"--processes-per-node {processes}: this machine has {counted(gpus, 'GPU')}",
            mend=f"add --cpu, or start {'one' if gpus < 2 else gpus} at most",
            code="USAGE",
        )
    return Topology((processes,), address=address, port=options.port, cpu=not gpus)


def check_expected(request: Request, world: int) -> None:
    """USAGE where the arguments of training/run.py expect another number of processes."""
    expected = request.flags.expect_processes
    if expected not in (None, world):
        raise UserError(
            f"--expect-processes {expected}: {world} would be started",
            mend="leave it out: lockstep launch says it by itself",
            code="USAGE",
        )


def start_again(options: Options, topology: Topology, starts: Starts, once: Once) -> int:
    """Say what is started, start it, and again as long as that is asked for and may help; the exit code."""
    say(topology.words())
    for one in shown(options, topology, starts):
        say(one.text())
    if options.dry_run:
        return 0
    with StopSignals() as signals:
        while True:
            outcome = once(topology, starts, signals)
            ended = starts.after(outcome, asked=signals.asked)
            if ended is None and signals.asked:
                ended = starts.stopped_between(outcome)
            if ended is not None:
                return ended.exit_code


def shown(options: Options, topology: Topology, starts: Starts) -> list[Command]:
    """The commands to show: all of them, with their variables, where nothing else happens."""
    words = starts.words(topology.world)
    if options.launcher != LAUNCHERS[0]:
        return [COMMANDS[options.launcher](topology, PROGRAM, words)]
    commands = rank_commands(topology, words)
    return commands if options.dry_run else [Command(commands[0].argv)]


def rank_commands(topology: Topology, words: list[str]) -> list[Command]:
    """What starts each process here; one that is alone has no others to find, and no place among them."""
    commands = process_commands(topology, PROGRAM, words)
    if topology.world > 1:
        return commands
    cpu = {name: value for name, value in commands[0].variables.items() if name == "ACCELERATE_USE_CPU"}
    return [Command(commands[0].argv, cpu)]


def start_here(topology: Topology, starts: Starts, signals: StopSignals) -> Outcome:
    """One start of all processes, on this machine, by ourselves."""
    starts.begin(topology)
    with Children() as children:
        # Theirs before they are there: nobody else can have the port, nobody elsewhere can reach it.
        with socket.create_server((LOOPBACK, 0), backlog=BACKLOG) as listener:
            port = listener.getsockname()[1]
            start_ranks(children, replace(topology, port=port), starts, listener)
        see_out(children, signals, Others())
    return outcome_of(children.ends, starts.failure(), signals.heard, learning=starts.learning)


def start_ranks(
    children: Children,
    topology: Topology,
    starts: Starts,
    listener: socket.socket | None = None,
    token: str = "",
) -> None:
    """Start the processes of this node; `listener`: where all processes meet, if process zero is here."""
    secret = {
        LAUNCHER: str(os.getpid()),
        "LOCKSTEP_TOKEN": token or secrets.token_hex(16),
        "LOCKSTEP_START": str(starts.number),
        "LOCKSTEP_WAIT": f"{starts.options.wait:g}",
    }
    for local, command in enumerate(rank_commands(topology, starts.words(topology.world))):
        rank, variables, files = topology.first_rank + local, secret, list[int]()
        if listener is not None and rank == 0 and topology.world > 1:
            files = [listener.fileno()]
            variables = {**secret, "LOCKSTEP_LISTENER": str(listener.fileno())}
        children.start(Plan(rank, command, variables, files))


def start_agent(topology: Topology, starts: Starts, signals: StopSignals) -> Outcome:
    """One start of torchrun or accelerate, which start this node's processes."""
    starts.begin(topology)
    agent = starts.options.launcher
    with Children() as children:
        command = COMMANDS[agent](topology, PROGRAM, starts.words(topology.world))
        variables = {"LOCKSTEP_START": str(starts.number)}
        # Their processes notice that their agent has ended, and it would wait for them for minutes.
        children.start(Plan(0, command, variables, prepare=lambda: die_with_parent(signal.SIGKILL)))
        see_out(children, signals, Others())
    if children.ends[0].code < 0:
        time.sleep(GRACE + 1)  # its processes have not been seen out: they are about to notice, and leave
    return outcome_of_agent(children.ends[0], starts.failure(), signals.heard, agent=agent)
