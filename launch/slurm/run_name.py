"""Where a SLURM job's run is: the same folder for the one who submits it and for each of its starts; pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from training.command import Request
from training.config import UserError


def run_directory(request: Request, env: Mapping[str, str]) -> Path:
    """The run's folder in the job that has SLURM's variables `env`; USAGE.

    It is that of --run-dir, else runs/RECIPE-JOB, or runs/RECIPE-ARRAY_TASK in an array: a job keeps its
    number when it is requeued, and so finds its run again. To evaluate and to predict, a run has to be named.
    """
    if request.flags.run_dir is not None:
        return Path(request.flags.run_dir)
    if request.mode == "train":
        return Path("runs") / f"{Path(request.flags.config).stem}-{job_name_of(env)}"
    if request.flags.weights not in ("best", "last"):
        return request.run_dir
    raise UserError(
        f"{request.mode} in a job: of which run?",
        mend="name its folder: --run-dir runs/NAME, or a file of weights: --weights FILE",
        code="USAGE",
    )


def job_name_of(env: Mapping[str, str]) -> str:
    """What SLURM calls the job: JOB, or ARRAY_TASK in an array; USAGE where that is no number."""
    names = (
        ["SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"] if env.get("SLURM_ARRAY_TASK_ID") else ["SLURM_JOB_ID"]
    )
    for name in names:
        if not re.fullmatch("[0-9]{1,12}", env.get(name, "")):
            raise UserError(
                f"{name}={env.get(name, '')[:80]!r} is no number",
                mend="start inside of sbatch, salloc or srun, which set it",
                code="USAGE",
            )
    return "_".join(env[name] for name in names)
