"""What the processes tell one another of an optimizer step: one vector, added up during the next one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from data_pipeline.batch import BadSample
from training.counts import DIGEST_PARTS, SharedSums, digest_parts, joined_digest
from training.stopwatch import Lap

REST = 3 + DIGEST_PARTS  # numbers behind the sums: stop, save, bad samples, digest


@dataclass
class Share:
    """What one process has of a step; the sums of all processes are added up.

    `sums` are float64 [G, S] of the objective: a row for each grain, zero but for this process's own, so that
    adding them up over processes rounds nothing; outside exact mode there is one row. They lie at the head of
    `told`, which travels.
    """

    told: torch.Tensor
    sums: torch.Tensor
    bad: list[BadSample] = field(default_factory=list)
    digest: int = 0
    stop: bool = False  # whether this process was asked to stop
    save: bool = False  # whether its clock says that it is time to save

    @classmethod
    def empty(cls, rows: int, size: int, device: torch.device) -> Share:
        """Nothing yet of `rows` rows of `size` sums."""
        told = torch.zeros(rows * size + REST, dtype=torch.float64, device=device)
        return cls(told, told[: rows * size].view(rows, size))


@dataclass(frozen=True)
class Report:
    """A step over all processes."""

    sums: torch.Tensor  # float64 [S], on the CPU
    bad: int  # samples left out
    stop: bool
    save: bool
    digest: str  # of the batch, 16 hex digits


@dataclass(frozen=True)
class Taken:
    """An optimizer step (from 0) that this process has done; what the others did is under way."""

    step: int
    rows: int
    told: SharedSums
    bad: list[BadSample]  # left out by this process
    lap: Lap  # what this process's seconds went into
    skipped: str = ""  # why the weights were left as they are; empty: they were not

    @classmethod
    def told_to_all(cls, share: Share, *, step: int, lap: Lap, skipped: str = "") -> Taken:
        """Send what this process has of the step on its way; every process comes here."""
        rest = [float(share.stop), float(share.save), float(len(share.bad)), *digest_parts(share.digest)]
        if any(rest):  # at most steps there is nothing to tell beside the sums
            share.told[-REST:] = torch.tensor(rest, dtype=torch.float64, device=share.told.device)
        return cls(step, len(share.sums), SharedSums(share.told), share.bad, lap, skipped)

    def report(self) -> Report:
        """Wait for the others' part."""
        numbers = self.told.result()
        sums, (stop, save, bad) = (
            torch.tensor(numbers[:-REST], dtype=torch.float64),
            numbers[-REST:-DIGEST_PARTS],
        )
        return Report(
            sums=added(sums.view(self.rows, -1)) if self.rows > 1 else sums,
            bad=int(bad),
            stop=bool(stop),
            save=bool(save),
            digest=joined_digest(numbers[-DIGEST_PARTS:]),
        )


def added(rows: torch.Tensor) -> torch.Tensor:
    """Rows [G, S] added up from the first to the last, so that the sum does not depend on who had which."""
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total
