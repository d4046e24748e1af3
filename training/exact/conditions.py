"""What exact mode asks of a start: processes that can halve the grains, and arithmetic in one order."""

from __future__ import annotations

import os

import torch

from data_pipeline.fault import UserError
from training.config import Config
from training.exact.sum_tree import process_counts


def check_processes(config: Config, processes: int) -> None:
    """CONFIG where so many processes cannot share the grains of a global batch without another sum."""
    train, allowed = config.train, process_counts(config.grains)
    if processes in allowed:
        return
    mend = f"start {listed(allowed)}"
    grain, left = divmod(train.global_batch, processes)
    if processes & (processes - 1) == 0 and not left:
        mend += f"; or cut the batch finer, which takes a new run: --fresh --train.grain {grain}"
    raise UserError(
        f"train.exact: {processes} processes cannot share the {config.grains} grains (of {config.grain} "
        "samples) of a global batch without changing the sums: that takes a power of two that divides "
        f"{config.grains}",
        mend=mend,
        code="CONFIG",
    )


def listed(counts: list[int]) -> str:
    """Numbers of processes in words: "1, 2 or 4 processes"."""
    *first, last = map(str, counts)
    return f"{', '.join(first)} or {last} processes" if first else f"{last} process"


def fix_arithmetic(*, cpu: bool) -> None:
    """Let every operation add up in the same order each time; before anything is computed.

    An operation of CUDA that cannot raises a RuntimeError from then on.
    """
    if cpu and "OMP_NUM_THREADS" not in os.environ:
        # torchrun gives each process one thread, plain Python all cores: the sums inside an operation differ.
        torch.set_num_threads(1)
    # cuBLAS reads this when it starts; whatever else somebody has set there gives other bits, or none.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    # That would also fill all memory before its use: nothing of ours reads what was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
