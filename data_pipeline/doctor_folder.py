"""Looks through the folder of a data set for what does not belong there, and for shards named twice.

Tars in a folder of their own are somebody else's, who may have more of them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from data_pipeline.findings import Finding, Findings
from data_pipeline.index import DatasetIndex, index_name


def check_folder(root: Path, dataset: DatasetIndex, found: Findings) -> None:
    """Shards that dataset.json names twice; tars and indexes it does not name; unfinished files."""
    names = [shard.name for split in dataset.splits.values() for shard in split.shards]
    for name, count in sorted(Counter(names).items()):
        if count > 1:
            found.add(Finding("shard-named-twice", f"dataset.json names it {count} times", name))
    ours = {*names, *map(index_name, names)}
    for path in sorted(root.iterdir()):
        if path.name.endswith(".part"):
            found.add(Finding("leftover", f"an unfinished file: {path.name!r}"))
        elif path.suffix in (".tar", ".idx") and path.name not in ours:
            found.add(Finding("stranger", f"dataset.json does not name {path.name!r}"))
