"""What the processes tell one another of an optimizer step: one vector, added up during the next one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from data_pipeline.batch import BadSample
from training.counts import DIGEST_PARTS, SharedSums, digest_parts, joined_digest


@dataclass
class Share:
    """What one process has of a step; the sums of all processes are added up.

    `sums` are float64 [G, S] of the objective: a row for each grain, zero but for this process's own, so that
    adding them up over processes rounds nothing; outside exact mode there is one row.
    """

    sums: torch.Tensor
    bad: list[BadSample] = field(default_factory=list)
    digest: int = 0
    stop: bool = False  # whether this process was asked to stop
    save: bool = False  # whether its clock says that it is time to save


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
    seconds: dict[str, float]  # of this process, by what they went into
    skipped: str = ""  # why the weights were left as they are; empty: they were not

    @classmethod
    def told_to_all(cls, share: Share, *, step: int, seconds: dict[str, float], skipped: str = "") -> Taken:
        """Send what this process has of the step on its way; every process comes here."""
        rest = [float(share.stop), float(share.save), float(len(share.bad)), *digest_parts(share.digest)]
        told = torch.tensor(rest, dtype=torch.float64, device=share.sums.device)
        vector = torch.cat([share.sums.reshape(-1), told])
        return cls(step, len(share.sums), SharedSums(vector), share.bad, seconds, skipped)

    def report(self) -> Report:
        """Wait for the others' part."""
        vector = torch.tensor(self.told.result(), dtype=torch.float64)
        sums, digest = vector[: -3 - DIGEST_PARTS], vector[-DIGEST_PARTS:]
        stop, save, bad = vector[-3 - DIGEST_PARTS : -DIGEST_PARTS]
        return Report(
            sums=added(sums.view(self.rows, -1)),
            bad=int(bad),
            stop=bool(stop),
            save=bool(save),
            digest=joined_digest(digest.tolist()),
        )


def added(rows: torch.Tensor) -> torch.Tensor:
    """Rows [G, S] added up from the first to the last, so that the sum does not depend on who had which."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total
