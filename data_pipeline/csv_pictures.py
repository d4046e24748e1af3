"""Finds the picture that a cell of a CSV names, below the folder of its pictures and nowhere else."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from posixpath import normpath

from data_pipeline.fault import UserError
from data_pipeline.items import stem
from data_pipeline.picture_files import PICTURE_EXTENSIONS, files_below


class CsvPictures:
    """The files below a folder, listed once: a million rows then cost no look at the disk.

    A cell may be a path relative to the folder or absolute, with or without extension, or the bare name of a
    file somewhere below, if there is only one of that name.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(
                f"no folder '{folder}'", mend="give the folder that holds the pictures of the CSV"
            )
        self.folder = folder
        self._prefixes = tuple(f"{place}/" for place in (folder.absolute(), folder.resolve()))
        self._names = set(files_below(folder))
        extensions = {name[len(stem(name)) :] for name in self._names}
        self._extensions = sorted(one for one in extensions if one.lower() in PICTURE_EXTENSIONS)

    def inside(self, value: str) -> bool:
        """Whether a path stays below the folder: any other is refused, wherever it leads."""
        if value in self._names:
            return True
        relative = self._relative(value)
        return not relative.startswith("/") and relative != ".." and not relative.startswith("../")

    def find(self, value: str) -> str:
        """The file that a cell names, relative to the folder; LookupError says why there is none."""
        if value in self._names:
            return value
        if not value:
            raise LookupError("no picture is named")
        name = self._relative(value)
        if name in self._names:
            return name
        found = [one for one in self._spellings(name) if one in self._names]
        if not found and "/" not in name:
            found = [
                one for spelling in self._spellings(name) for one in self._by_file_name.get(spelling, ())
            ]
        if len(found) > 1:
            raise LookupError(f"{value!r} may be '{found[0]}' or '{found[1]}' in '{self.folder}'")
        if not found:
            raise LookupError(f"no picture {value!r} in '{self.folder}'")
        return found[0]

    def holds(self, value: str) -> bool:
        """Whether a cell names a picture."""
        try:
            return self.inside(value) and bool(self.find(value))
        except LookupError:
            return False

    def _relative(self, value: str) -> str:
        prefix = next((one for one in self._prefixes if value.startswith(one)), "")
        return normpath(value[len(prefix) :])

    def _spellings(self, name: str) -> list[str]:
        return [name, *(name + extension for extension in self._extensions)]

    @cached_property
    def _by_file_name(self) -> dict[str, tuple[str, ...]]:
        """Where each name of a file lies; of three places two are enough to see that it is not clear."""
        places: dict[str, tuple[str, ...]] = {}
        for name in sorted(self._names):
            base = name.rpartition("/")[2]
            places[base] = (*places.get(base, ()), name)[:2]
        return places
