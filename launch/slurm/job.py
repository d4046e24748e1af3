"""Runs training inside of a SLURM job: its batch script ends in this program, which starts srun.

It hears of the end of the time and of stops, has the processes save, and lets the job start again where that
goes on. What it cannot do in its own time SLURM does: it ends all that is left with the batch script.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import replace

from data_pipeline.command_line import say
from launch.attempts import Outcome, record_start, steps_before, stuck
from launch.options import Options
from launch.slurm import scontrol
from launch.slurm.attempt import Job, command_of, say_no_progress, start_processes, words_of
from launch.slurm.lead import Lead, given_lead
from launch.slurm.requeue import AGAIN, Decision, Situation, decide
from launch.slurm.run_name import job_name_of, run_directory
from launch.slurm.step import Inbox, Told, note
from launch.topology import of_slurm_job
from training.command import Request
from training.vigil.ending import EXIT_CODES

SETTLE = 3.0  # seconds in which SLURM, having ended the processes, has told the batch script too
IN_PLACE = frozenset({EXIT_CODES["CRASH"], EXIT_CODES["HANG"]})  # what --max-restarts starts again here


def run_job(options: Options, request: Request, words: Sequence[str]) -> int:
    """Train, evaluate or predict with all that SLURM gave to this job; the exit code. USAGE."""
    inbox, told = Inbox(), Told()
    job = _job(options, request, words)
    before = f", restarted {job.restarts} times" if job.restarts else ""
    say(f"job {job.name}{before}: {job.topology.words()}")
    say(f"run directory {job.run_dir}")
    if options.dry_run:
        say(command_of(job, words, "lockstep").text())
        return 0
    facts = scontrol.job_facts(job.name)
    lead = Lead(_announced(), facts.ends if facts else None)
    outcome, lost = _starts(job, inbox, told, lead)
    if outcome.exit_code in (0, 2) or not job.saves:
        return outcome.exit_code
    if outcome.name in AGAIN or lost:
        _hear(inbox, told, SETTLE)
    decision = _decision(job, outcome, told, lost=lost)
    if decision.requeue:
        decision = replace(decision, words=scontrol.requeue(job.name))
        if not decision.words:
            say(f"job {job.name} is requeued, and goes on from its newest checkpoint")
    if decision.exit_code != outcome.exit_code:
        say_no_progress(job)
    elif decision.words:
        say(f"{decision.words}: to go on, submit the same again with --run-dir {job.run_dir.absolute()}")
    return decision.exit_code


def _decision(job: Job, outcome: Outcome, told: Told, *, lost: bool) -> Decision:
    facts = scontrol.job_facts(job.name)
    return decide(
        Situation(
            mode=job.request.mode,
            exit_code=outcome.exit_code,
            name=outcome.name,
            node_lost=lost,
            terminated=told.terminated,
            time_is_over=facts is not None and facts.time_is_over,
            stuck=stuck(steps_before(job.run_dir)),
            state=facts.state if facts else None,
            allowed=facts.requeue if facts else True,
            batch=facts.batch if facts else "SLURM_TASK_PID" in os.environ,
        )
    )


def _job(options: Options, request: Request, words: Sequence[str]) -> Job:
    env = os.environ
    topology = of_slurm_job(env)
    if options.cpu:
        topology = replace(topology, cpu=True)
    if options.processes_per_node is not None:
        each, before = options.processes_per_node, max(topology.processes)
        cores = (topology.cores or 0) * before // each
        topology = replace(topology, processes=(each,) * topology.nodes, cores=cores)
    topology = replace(topology, address=_reachable(topology.address))
    count = env.get("SLURM_RESTART_COUNT", "0")
    restarts = int(count) if count.isascii() and count.isdigit() else 0
    return Job(options, request, words, job_name_of(env), restarts, topology, run_directory(request, env))


def _reachable(host: str) -> str:
    """The name of a node where it resolves, else its address as SLURM knows it."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return scontrol.node_address(host)
    return host


def _announced() -> int | None:
    """How long before the end of its time this job is told; the submitter's word goes before the script's."""
    for name in ("LOCKSTEP_SIGNAL_SECONDS", "SBATCH_SIGNAL"):
        if (seconds := given_lead(os.environ.get(name))) is not None:
            return seconds
    return scontrol.announced_seconds(os.environ["SLURM_JOB_ID"])


def _starts(job: Job, inbox: Inbox, told: Told, lead: Lead) -> tuple[Outcome, bool]:
    """Start the processes, and again after a crash as often as asked for; the last end, and a lost node."""
    left, again = job.options.max_restarts, job.restarts > 0
    while True:
        steps: list[int | None] = []
        words = words_of(job, again=again)
        if job.saves:
            size = {"processes": job.topology.world, "nodes": job.topology.nodes}
            steps = record_start(job.run_dir, again=again, job=job.name, **size)
        if again and stuck(steps):
            say_no_progress(job)
            return Outcome(EXIT_CODES["CRASH"]), False
        outcome, lost = start_processes(job, words, inbox, told, lead, number=max(0, len(steps) - 1))
        again = True
        if not left or lost or told.stop or outcome.exit_code not in IN_PLACE or not job.saves:
            return outcome, lost
        if stuck(steps_before(job.run_dir)):
            say_no_progress(job)
            return outcome, False
        left -= 1
        say(f"{outcome.what.removeprefix('error: ')}: started again, {left} restarts are left")


def _hear(inbox: Inbox, told: Told, seconds: float) -> None:
    """Wait whether SLURM says something."""
    end = time.monotonic() + seconds
    while not told.terminated and (left := end - time.monotonic()) > 0:
        for number in inbox.wait(left):
            note(told, number, saves=True)
