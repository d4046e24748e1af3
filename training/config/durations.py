"""Lengths of training as people say them: 500, 500st, 3ep, 20000sp or 10%, in optimizer steps at the end."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

UNITS = {"st": "steps", "ep": "epochs", "sp": "samples", "%": "% of the run"}
_WRITTEN = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*(st|steps?|ep|epochs?|sp|samples?|%)?")


def read_duration(written: Any) -> str:
    """The canonical spelling, such as 3ep; a number alone counts optimizer steps. ValueError otherwise."""
    found = _WRITTEN.fullmatch(str(written).strip())
    if isinstance(written, bool) or found is None:
        raise ValueError("is no duration: write 500 (optimizer steps), 3ep, 20000sp (samples) or 10%")
    unit = {"sa": "sp"}.get(short := (found[2] or "st")[:2], short)
    if unit in ("st", "sp") and float(found[1]) % 1:
        raise ValueError(f"is no whole number of {UNITS[unit]}")
    return f"{found[1]}{unit}"


Duration = Annotated[str, BeforeValidator(read_duration)]


def in_steps(duration: str, *, steps: int, steps_per_epoch: int, global_batch: int) -> int:
    """Optimizer steps of a duration in a run of `steps`; samples are rounded up to whole steps."""
    unit = duration.lstrip("0123456789.")
    number = float(duration.removesuffix(unit))
    each = {"st": 1.0, "ep": steps_per_epoch, "sp": 1 / global_batch, "%": steps / 100}[unit]
    # A sum such as 0.1 * 30 must not become 4 steps for its last bit.
    exact = round(number * each, 6)
    return -int(-exact // 1) if unit == "sp" else round(exact)
