"""Starts the processes of one of several machines; their launchers meet, start together, and end alike."""

from __future__ import annotations

import signal
import socket
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

from data_pipeline.command_line import say
from launch.agreement import agree, hear_verdict
from launch.attempts import Outcome
from launch.children import Children, see_out
from launch.command import Command
from launch.ends import STOPPED, outcome_of
from launch.gathering import Group, attend, gather, listen
from launch.node import rank_commands, start_ranks, this_machine
from launch.options import Options
from launch.starts import Starts, first_line
from launch.stop_signals import Asked, StopSignals
from launch.topology import Topology
from training.command import Request
from training.vigil.ending import speak


class Launcher(NamedTuple):
    """One of those that start together."""

    options: Options
    here: Topology  # of this machine alone
    given: list[str]  # arguments of training/run.py, as they were typed
    starts: Starts
    signals: StopSignals
    port: socket.socket | None  # of node 0: where the others come


def run_nodes(options: Options, request: Request, words: list[str]) -> int:
    """Start this machine's part of the training and see it out; the exit code, the same on all machines."""
    here = this_machine(options)
    starts = Starts(options, request, words)
    if options.dry_run:
        alike = replace(here, processes=here.processes * options.nodes, node_rank=options.node_rank)
        say(f"{alike.words()}, if all have so many")
        for one in rank_commands(alike, starts.words(alike.world)):
            say(one.text())
        return 0
    with ExitStack() as stack:
        port = stack.enter_context(listen(options)) if options.node_rank == 0 else None
        signals = stack.enter_context(StopSignals())
        at = f"{options.address}:{options.port}"
        say(f"node {options.node_rank} of {options.nodes}: {here.words()}; the nodes meet at {at}")
        return _repeat(Launcher(options, here, words, starts, signals, port))


def _repeat(launcher: Launcher) -> int:
    """Meet, start, and meet again as long as node 0 says so; the exit code."""
    last = None
    while True:
        try:
            with launcher.signals.raising():
                group = _meet(launcher)
        except Asked as asked:
            return _stopped(launcher.starts, asked.number, last).exit_code
        if last is None:
            say(group.topology.words())
            words = launcher.starts.words(group.topology.world)
            say(Command(rank_commands(group.topology, words)[0].argv).text())
        with group.links:
            last = _once(launcher, group)
            ended = _conclude(launcher, group, last)
        if ended is not None:
            return ended.exit_code


def _meet(launcher: Launcher) -> Group:
    if launcher.port is not None:
        start = launcher.starts.number
        return gather(launcher.options, launcher.here, launcher.given, start, launcher.port)
    group = attend(launcher.options, launcher.here, launcher.given)
    launcher.starts.number = group.start
    return group


def _once(launcher: Launcher, group: Group) -> Outcome:
    """One start of this machine's processes, seen out."""
    starts = launcher.starts
    starts.begin(group.topology)
    with Children() as children:
        with ExitStack() as stack:
            if group.listener is not None:
                stack.enter_context(group.listener)
            start_ranks(children, group.topology, starts, group.listener, group.token)
        see_out(children, launcher.signals, group.links)
    failure = starts.failure()
    return outcome_of(children.ends, failure, launcher.signals.heard, learning=starts.learning)


def _conclude(launcher: Launcher, group: Group, mine: Outcome) -> Outcome | None:
    """How the launch ends, the same for all machines; None where all meet again for another start."""
    starts = launcher.starts
    if launcher.port is None:
        verdict = hear_verdict(group.links, launcher.signals, mine)
        asked = launcher.signals.asked
        # Without node 0 each decides for itself: a person may start it again.
        again = starts.may_follow(verdict.outcome, asked=asked) if verdict.again is None else verdict.again
        if again:
            starts.follow(verdict.outcome)
            return None
    else:
        verdict = agree(group.links, launcher.signals, mine)
        spoken = verdict.outcome._replace(spoken=True)
        ended = starts.after(spoken, asked=launcher.signals.asked)
        verdict = verdict._replace(outcome=ended or verdict.outcome, again=ended is None)
        group.links.tell({"verdict": verdict.as_json()})
        group.links.part()
        if ended is not spoken:
            return ended  # none, or one that `after` has said already
    outcome = verdict.outcome
    if outcome.name and (outcome.exit_code != mine.exit_code or not mine.spoken):
        starts.say(outcome, writes=launcher.port is not None)
    elif outcome.name and verdict.node != launcher.options.node_rank:
        line = first_line(outcome)
        speak(line if line.startswith(verdict.who) else f"{verdict.who}: {line}")
    return outcome


def _stopped(starts: Starts, number: int, last: Outcome | None) -> Outcome:
    """A stop was asked for while the launchers met."""
    if last is not None:
        return starts.stopped_between(last)
    if number == signal.SIGINT or not starts.learning:
        return Outcome(128 + number)
    stopped = Outcome(STOPPED, "STOPPED", f"stopped on {signal.Signals(number).name}, before training began")
    starts.say(stopped, writes=False)
    return stopped
