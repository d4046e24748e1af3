"""Lists the files and folders of a source, by name alone: nothing is opened, and nothing goes unseen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipeline.fault import UserError

PICTURE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class SplitFolder(NamedTuple):
    """A folder whose name says which split its pictures belong to."""

    path: Path
    split: str


def files_below(folder: Path, *, extensions: tuple[str, ...] = ()) -> list[str]:
    """The files of a folder and of those in it, relative to it, sorted; DATA where one cannot be listed.

    Hidden files and folders (thumbnails, notebook checkpoints) are no one's samples. Links are followed, but
    not round in circles. `extensions` in lower case choose files; without them it is all of them.
    """
    names: list[str] = []
    pending: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [
        (os.fspath(folder), "", (_identity(os.fspath(folder)),))
    ]
    while pending:
        place, prefix, above = pending.pop()
        for entry in _entries(place):
            name = prefix + entry.name
            if not _is_folder(entry):
                if not extensions or entry.name.lower().endswith(extensions):
                    names.append(name)
                continue
            identity = _identity(entry.path)
            if identity not in above:
                pending.append((entry.path, f"{name}/", (*above, identity)))
    return sorted(names)


def subfolders(folder: Path) -> list[Path]:
    """The folders directly in it, sorted by name."""
    return sorted(folder / entry.name for entry in _entries(os.fspath(folder)) if _is_folder(entry))


def loose_pictures(folder: Path) -> list[str]:
    """The names of the pictures directly in a folder, sorted."""
    names = [entry.name for entry in _entries(os.fspath(folder)) if not _is_folder(entry)]
    return sorted(name for name in names if name.lower().endswith(PICTURE_EXTENSIONS))


def split_folders(folder: Path) -> list[SplitFolder]:
    """Its folders, where they are splits by name (train, valid …); none where they are something else.

    DATA where a folder for training and one for another split stand beside folders that are no splits: as
    classes or as splits, either reading would be wrong for some of them.
    """
    folders = subfolders(folder)
    splits = [
        SplitFolder(one, SPLIT_NAMES[one.name.lower()]) for one in folders if one.name.lower() in SPLIT_NAMES
    ]
    if len(splits) == len(folders):
        return splits
    if {"train"} < {one.split for one in splits}:
        strangers = [one.name for one in folders if one.name.lower() not in SPLIT_NAMES]
        known = ", ".join(one.path.name for one in splits)
        raise UserError(
            f"'{folder}' holds folders of splits ({known}) and beside them '{strangers[0]}', which is none",
            mend=f"move '{strangers[0]}' elsewhere, or call it by a split: {', '.join(SPLIT_NAMES)}",
        )
    return []


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    yield entry
    except OSError as error:
        raise _unlistable(folder, error) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say: whoever comes to read it reports it
        return False


def _identity(place: str) -> tuple[int, int]:
    try:
        status = Path(place).stat()
    except OSError as error:
        raise _unlistable(place, error) from None
    return status.st_dev, status.st_ino


def _unlistable(folder: str, error: OSError) -> UserError:
    return UserError(
        f"cannot list the folder '{folder}': {error.strerror}", mend="make it readable or remove it"
    )
