"""Reads what a sample should be recognised as, and refuses what cannot be."""

from __future__ import annotations

import re
from collections.abc import Callable

from data_pipeline.batch import RawSample
from data_pipeline.fault import UserError

# ASCII digits only: int() also takes '٣', '1_0' and megabytes of digits.
CLASS_NUMBER = re.compile(rb"[0-9]{1,9}")


def class_number(raw: RawSample, classes: int) -> int:
    """The class of a multiclass sample, 0 <= class < classes, from its member `cls`."""
    text = raw.members.get("cls")
    if text is None or not CLASS_NUMBER.fullmatch(text.strip()) or int(text) >= classes:
        found = "no label" if text is None else f"the label {text[:20]!r}"
        raise UserError(
            f"'{raw.shard}': sample {raw.key!r} has {found}, allowed are 0 to {classes - 1}",
            mend="mend the label at its source and pack the data set again",
            place={"shard": raw.shard, "member": f"{raw.key}.cls", "offset": raw.offset},
        )
    return int(text)


def target_reader(task: str) -> Callable[[RawSample, int], int]:
    """The function that reads targets of a task; DATA where this version knows no such task."""
    if task not in TARGETS:
        raise UserError(
            f"dataset.json is of the task {task!r}, this version knows {', '.join(TARGETS)}",
            mend="install the version of lockstep that packed the data set, or pack it again",
        )
    return TARGETS[task]


TARGETS: dict[str, Callable[[RawSample, int], int]] = {"multiclass": class_number}
