"""Keeps bad_samples.jsonl, the training samples that could not be used, and ends a run with too many."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from data_pipeline.batch import BadSample
from data_pipeline.fault import UserError
from data_pipeline.index import DatasetIndex
from training.config import Config
from training.process import agree

BAD_SAMPLES_FILE = "bad_samples.jsonl"


def most_bad(config: Config, dataset: DatasetIndex) -> int:
    """Different samples of the training split that may be broken."""
    return int(config.data.max_bad * dataset.split(config.data.train_split).samples)


class BadSamples:
    """What all processes met, written by process zero: each sample once in the life of a run."""

    def __init__(self, run_dir: Path, accelerator: Accelerator, *, most: int) -> None:
        self._path, self._accelerator, self._most = run_dir / BAD_SAMPLES_FILE, accelerator, most
        self._met: list[dict[str, Any]] = []
        self._known: set[tuple[str, str]] = set()
        if accelerator.is_main_process and self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A line that a kill broke off is written again when its sample is met again.
            whole = [json.loads(line) for line in lines if line.endswith("}\n")]
            self._known = {(one["shard"], one["key"]) for one in whole}
            self._path.write_text("".join(line for line in lines if line.endswith("}\n")), encoding="utf-8")

    def met(self, step: int, bad: list[BadSample]) -> None:
        """Remember what this process met in a step (from 1), until all processes settle it."""
        self._met += [{"step": step, **asdict(one)} for one in bad]

    def settle(self, say: Callable[[str], None]) -> None:
        """Write down what is new; every process comes here after the same step. DATA where it is too much."""
        everything: list[dict[str, Any]] = gather_object(self._met)
        self._met = []
        agree(self._accelerator, lambda: self._write(everything, say))

    def _write(self, everything: list[dict[str, Any]], say: Callable[[str], None]) -> None:
        new = {(one["shard"], one["key"]): one for one in everything}
        new = {name: one for name, one in sorted(new.items()) if name not in self._known}
        self._known |= new.keys()
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in new.values())
        for one in new.values():
            say(
                f"left out  {one['exception']}; {one['replaced_by']!r} takes its place "
                f"({len(self._known)} so far, at most {self._most})"
            )
        if len(self._known) > self._most:
            last = next(reversed(new.values()))
            raise UserError(
                f"{len(self._known)} samples of the training split are broken, data.max_bad allows "
                f"{self._most}; the last: {last['exception']}",
                mend=f"lockstep doctor lists all of them (so does '{self._path}'); mend them, or raise "
                "--data.max-bad",
                place={"shard": last["shard"], "member": last["key"], "offset": last["offset"]},
            )
