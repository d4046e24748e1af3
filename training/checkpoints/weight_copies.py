"""Copies weights out of checkpoints to where a user takes them away, and remembers copies that it owes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from data_pipeline.disk import copy_file, file_sha256, replace_file, write_file
from training.checkpoints.manifest import listed_sha256
from training.checkpoints.protocol import step_of
from training.checkpoints.storage_failures import described, warn

MODEL_JSON = "model.json"
LEFTOVER = re.compile(r"\.(((last|best|epoch-\d{4,})\.safetensors)|model\.json)\.part", re.ASCII)


class WeightCopies:
    """weights/NAME.safetensors, each a copy of `file` of some checkpoint, and model.json beside them.

    On a disk that is full a copy stays owed until there is room, and its checkpoint has to stay as well.
    """

    def __init__(self, folder: Path, file: str) -> None:
        self._folder, self._file = folder, file
        self._owed: dict[str, Path] = {}
        self._about: str | None = None

    @property
    def owed(self) -> Collection[str]:
        """Names of files that are not what they should be yet."""
        return list(self._owed)

    def remove_leftovers(self) -> None:
        """Remove what a kill left of copies that were under way."""
        for path in sorted(self._folder.glob(".*.part")):
            if LEFTOVER.fullmatch(path.name):
                path.unlink()

    def owe(self, checkpoint: Path, names: Iterable[str], *, about: str) -> None:
        """From now on the files of these names should be of that checkpoint, and model.json say `about`."""
        self._owed.update(dict.fromkeys(names, checkpoint))
        self._about = about

    def outdated(self, checkpoint: Path, names: Iterable[str]) -> list[str]:
        """Those of the names whose files are not of this checkpoint: a kill came between it and the copy."""
        sha256 = listed_sha256(checkpoint, self._file)
        paths = {name: self._folder / f"{name}.safetensors" for name in names}
        return [name for name, path in paths.items() if not path.is_file() or file_sha256(path) != sha256]

    def pay(self) -> list[int]:
        """Copy what is owed, as far as the disk allows; the steps whose checkpoints are still needed."""
        place, needed = self._folder, 0
        try:
            for name, checkpoint in list(self._owed.items()):
                source, place = checkpoint / self._file, self._folder / f"{name}.safetensors"
                needed = source.stat().st_size
                replace_file(place, lambda part, source=source: copy_file(source, part))  # type: ignore[misc]
                del self._owed[name]
            if self._about is not None:
                text, place = self._about.encode(), self._folder / MODEL_JSON
                needed = len(text)
                replace_file(place, lambda part: write_file(part, [text]))
                self._about = None
        except OSError as error:
            warn(f"weights are not copied out of their checkpoint yet: {described(error, place, needed)}")
        return [step_of(checkpoint) for checkpoint in self._owed.values()]
