"""What a source of pictures is, once it is found: its items, their targets, keys and splits."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

Target = int | tuple[int, ...] | Path  # class number; labels (1, 0, -1 for missing); mask file


@dataclass(frozen=True, slots=True)
class Item:
    """One sample to pack: its picture, the key it gets in the tar, its split and its target.

    There may be ten million, so the picture's place is held as text: as a Path it would nearly double them.
    """

    file: str
    key: str
    split: str
    target: Target

    @property
    def path(self) -> Path:
        """Where the picture is."""
        return Path(self.file)


@dataclass(frozen=True)
class Source:
    """Everything that will be packed, in a fixed order, and in words what was found.

    `classes` is empty for a segmentation whose classes nobody named: the masks tell how many there are.
    """

    task: str  # one of index.TASKS
    classes: tuple[str, ...]
    items: tuple[Item, ...]
    kind: str


@dataclass(frozen=True)
class SourceOptions:
    """What the command line says of a source; what it leaves open is detected.

    An empty name as `split_column` or `group_column` means that no column is one.
    """

    kind: str | None = None  # "folders", "csv" or "pairs"
    images: Path | None = None  # of a CSV: the folder of its pictures; None: its own folder
    val_fraction: float = 0.2  # of the samples, where nothing says which split they belong to
    seed: int = 0
    label_columns: tuple[str, ...] = ()
    image_column: str | None = None
    split_column: str | None = None
    group_column: str | None = None
    classes: tuple[str, ...] = ()  # the names of a mask's classes; elsewhere the order of the classes
    masks: Path | None = None  # of pairs: the folder of the masks, where SOURCE is that of the images


class Found(NamedTuple):
    """A sample whose key is not settled: where its picture is, what its key is made of, and the rest."""

    file: str
    name: str  # a relative path; the keys keep its folders
    split: str
    target: Target


def keyed(found: Iterable[Found]) -> tuple[Item, ...]:
    """The items, in the same order, with keys that are the names without extension and dots.

    a.jpg and a.png beside each other are two samples: the second key of a split gets ~2.
    """
    taken: set[tuple[str, str]] = set()
    items = []
    for one in found:
        first = key = _key(one.name)
        number = 1
        while (one.split, key) in taken:
            number += 1
            key = f"{first}~{number}"
        taken.add((one.split, key))
        items.append(Item(one.file, key, one.split, one.target))
    return tuple(items)


def stem(name: str) -> str:
    """A relative path without the extension of its file."""
    dot = name.rfind(".")
    return name[:dot] if dot > name.rfind("/") + 1 else name


def utf8(name: str) -> str:
    r"""A name that is not UTF-8 on the disk, which JSON cannot hold, with its odd bytes written as \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _key(name: str) -> str:
    """Dots would end a WebDataset key early, so they become underscores."""
    return utf8(stem(name)).replace(".", "_")
