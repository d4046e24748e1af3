"""Numbers that processes add up: sums of a step, and the proof that an evaluation saw every sample once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data_pipeline.batch import Batch
from data_pipeline.draws import IntArray, hash64
from training.inputs import Inputs

T = TypeVar("T")

DIGEST_PARTS = 4  # of 16 bits each: as float64 they add exactly over any number of processes


def digest_parts(digest: int) -> list[float]:
    """A 64-bit digest as four numbers that float64 adds without rounding."""
    return [float(digest >> 16 * part & 0xFFFF) for part in range(DIGEST_PARTS)]


def joined_digest(parts: list[float]) -> str:
    """The sum modulo 2**64 of all digests whose parts were added up, as 16 hex digits."""
    return f"{sum(int(value) << 16 * part for part, value in enumerate(parts)) % 2**64:016x}"


def batch_digest(batch: Batch, inputs: Inputs, *, pixels: bool) -> int:
    """Sum modulo 2**64 of a hash per valid sample: of its key, or of key, pixels and targets with shares."""
    if not bool(batch.valid.all()):
        return 0
    seen = [inputs.images, inputs.targets] if pixels else []
    if pixels and inputs.partner_targets is not None:
        seen += [inputs.partner_targets, inputs.share]
    arrays = [tensor.cpu().numpy() for tensor in seen]
    rows = ((key.encode(), *(array[row].tobytes() for array in arrays)) for row, key in enumerate(batch.keys))
    return sum(hash64(*parts) for parts in rows) % 2**64


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


class SharedSums:
    """A vector of float64 sums over all processes, under way while the next step computes."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values
        self._work = dist.all_reduce(values, async_op=True) if _several() else None

    def tensor(self) -> torch.Tensor:
        """The sums; on a GPU its stream waits for them, the program does not."""
        if self._work is not None:
            self._work.wait()
        return self._values

    def result(self) -> list[float]:
        """Wait for the sums."""
        values: list[float] = self.tensor().tolist()
        return values


@dataclass(frozen=True)
class Certificate:
    """Proof of an evaluation: samples expected, seen, distinct, and the order-free digest of their keys."""

    expected: int
    seen: int
    unique: int
    digest: str

    def check(self, digest: str) -> None:
        """RuntimeError unless every sample of the split was seen exactly once (`digest`: of all its keys)."""
        if not self.expected == self.seen == self.unique or self.digest != digest:
            raise RuntimeError(
                f"the evaluation was not of the whole split: expected {self.expected}, digest {digest}; "
                f"saw {self.seen}, {self.unique} of them distinct, with digest {self.digest}"
            )


Runs = list[tuple[int, int]]  # [first, last) intervals of sample numbers


def add_to_runs(runs: Runs, numbers: IntArray) -> None:
    """Append sample numbers as intervals; an evaluation reads neighbours, so a process holds very few."""
    ordered = np.sort(numbers)
    breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
    for piece in np.split(ordered, breaks):
        first, last = int(piece[0]), int(piece[-1]) + 1
        if runs and runs[-1][1] == first:
            first = runs.pop()[0]
        runs.append((first, last))


def distinct(runs: Runs) -> int:
    """How many different numbers the intervals cover."""
    covered, end = 0, 0
    for first, last in sorted(runs):
        covered += max(0, last - max(first, end))
        end = max(end, last)
    return covered


def gather_runs(runs: Runs) -> Runs:
    """The intervals of all processes."""
    return [run for theirs in _gathered(runs) for run in theirs]


def gather_rows(rows: list[NDArray[Any]], *, width: int, kind: type) -> NDArray[Any]:
    """Rows [n, width] of all processes, one below the other in the order of the processes."""
    mine = np.concatenate(rows) if rows else np.empty((0, width), kind)
    return np.concatenate(_gathered(mine))


def exact_sums(rows: NDArray[Any]) -> torch.Tensor:
    """The sum of each column of rows [n, S], float64 [S], rounded once: it does not depend on their order."""
    if not np.isfinite(rows).all():
        return torch.from_numpy(rows).sum(dim=0)
    return torch.tensor([math.fsum(column) for column in rows.T], dtype=torch.float64)


def _gathered(mine: T) -> list[T]:
    if not _several():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
