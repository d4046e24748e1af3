"""The command `lockstep launch`: reads what is to be started before anything is, and finds who starts it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from launch.options import Options, parse
from launch.topology import by_srun
from training.command import read_request
from training.config import fatal_line
from training.vigil.ending import EXIT_CODES, Ended, speak


def launch(argv: list[str]) -> int:
    """Start training/run.py on this machine, on several, or in SLURM; its exit code: `lockstep launch`."""
    options, words = parse(argv)
    if options.slurm:
        from launch.slurm import submit

        return submit.submit(options, words)
    request = read_request(words)
    if request is None:
        return 0
    try:
        if _in_batch_step(os.environ) and not options.by_hand:
            from launch.slurm import job

            return job.run_job(options, request, words)
        if options.nodes > 1 and not _only_agents(options):
            from launch import nodes

            return nodes.run_nodes(options, request, words)
        from launch import node

        return node.run_node(options, request, words)
    except Ended as error:
        speak(f"{error.what}\n{fatal_line(error.code, rank=options.node_rank, hint=error.hint)}")
        return EXIT_CODES[error.code]


def _in_batch_step(env: Mapping[str, str]) -> bool:
    """Whether this is the batch script of a SLURM job, or a shell of salloc: all of the job is ours."""
    return bool(env.get("SLURM_JOB_ID")) and not by_srun(env) and shutil.which("srun") is not None


def _only_agents(options: Options) -> bool:
    return options.launcher != "lockstep"
