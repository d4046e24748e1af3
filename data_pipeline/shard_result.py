"""What came of packing one tar, as plain data: kept on the disk until all tars are there to be summed up.

Shapes: C classes (multilabel: labels).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Tally:
    """Exact sums over the samples of a tar.

    `class_counts` [C] counts samples (multilabel: those with a 1; segmentation: empty), `missing` the labels
    that nobody gave, `mask_values` [256] the pixels of each raw value, `histogram` [3][256] the pixels of
    each value in each channel of the pictures (a grey picture counts alike in all three).
    """

    class_counts: list[int]
    missing: int
    mask_values: list[int]
    histogram: list[list[int]]
    coloured: bool
    progressive: int  # JPEGs
    keys_digest: int  # the sum of the keys' hashes modulo 2**64


@dataclass(frozen=True)
class ShardResult:
    """A tar that was written. One without samples was not kept: nothing of it could be read."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str
    tally: Tally
    bad: list[list[str]]  # the file, what is wrong with it

    def as_json(self, plan: str) -> str:
        """One line of JSON that names the plan it belongs to."""
        return json.dumps({"plan": plan, **asdict(self)}) + "\n"


def result_from_json(text: str, plan: str) -> ShardResult | None:
    """The result in a text of `as_json`; None where it is another plan's, or no such text."""
    try:
        raw: dict[str, Any] = json.loads(text)
        if raw.pop("plan") != plan:
            return None
        return ShardResult(**{**raw, "tally": Tally(**raw["tally"])})
    except (LookupError, TypeError, ValueError, AttributeError):
        return None
