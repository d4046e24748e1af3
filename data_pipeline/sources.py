"""Finds a user's pictures and their labels on disk, before anything is read: their classes and splits."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.draws import Purpose, bit_stream, permutation
from data_pipeline.fault import UserError

PICTURE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Picture:
    """One labelled file: where it is, the key it gets in the tar, its class number and its split."""

    path: Path
    key: str
    label: int
    split: str


@dataclass(frozen=True)
class Source:
    """Everything that will be packed, in a fixed order, and in words what was found."""

    classes: tuple[str, ...]
    pictures: tuple[Picture, ...]
    kind: str


def class_folders(root: Path, *, val_fraction: float, seed: int) -> Source:
    """A folder per class, below `root` or below train/, val/ and test/; DATA where there is nothing to learn.

    Without split folders every class is divided by itself (stratified): `val_fraction` of it into val, by
    `seed`.
    """
    if not root.is_dir():
        raise UserError(
            f"no folder '{root}'", mend="give the folder that holds one folder of pictures per class"
        )
    folders = _subfolders(root)
    if not folders:
        raise UserError(
            f"'{root}' is empty: it holds no folder of pictures",
            mend=f"put the pictures of each class into a folder of its own: {root}/CLASS/picture.jpg",
        )
    presplit = all(folder.name.lower() in SPLIT_FOLDERS for folder in folders)
    if not presplit:
        classes, pictures = _read_classes(root, folders, "train")
        divided = _divide(_with_unique_keys(pictures), val_fraction=val_fraction, seed=seed)
        kind = f"a folder per class, {val_fraction:.0%} of each class held out for val"
        return Source(classes, tuple(divided), kind)
    names = sorted({folder.name for split in folders for folder in _subfolders(split)})
    found: list[Picture] = []
    for split in folders:
        by_class = [split / name for name in names if (split / name).is_dir()]
        found += _read_classes(split, by_class, SPLIT_FOLDERS[split.name.lower()], names)[1]
    kind = f"a folder per class inside {', '.join(folder.name for folder in folders)}"
    return Source(tuple(map(_utf8, names)), tuple(_with_unique_keys(found)), kind)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _read_classes(
    root: Path, folders: list[Path], split: str, names: list[str] | None = None
) -> tuple[tuple[str, ...], list[Picture]]:
    names = names or [folder.name for folder in folders]
    pictures: list[Picture] = []
    for folder in folders:
        paths = _pictures_below(folder)
        if not paths and split == "train":  # in the other splits a class may well be absent
            raise UserError(
                f"the class folder '{folder}' holds no pictures ({', '.join(PICTURE_EXTENSIONS)})",
                mend="put pictures into it or remove it",
            )
        label = names.index(folder.name)
        pictures += [Picture(path, _key(path.relative_to(root)), label, split) for path in paths]
    return tuple(map(_utf8, names)), pictures


def _pictures_below(folder: Path) -> list[Path]:
    """By their names; hidden files and folders (thumbnails, notebook checkpoints) are no one's samples."""
    paths = [Path(parent, name) for parent, _, files in os.walk(folder) for name in files]
    return sorted(
        path
        for path in paths
        if path.name.lower().endswith(PICTURE_EXTENSIONS)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _key(path: Path) -> str:
    """The path without its extension; dots would end a WebDataset key early, so they become underscores."""
    return _utf8(path.with_suffix("").as_posix()).replace(".", "_")


def _utf8(name: str) -> str:
    r"""A name that is not UTF-8 on the disk, which JSON cannot hold, with its odd bytes written as \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _with_unique_keys(pictures: list[Picture]) -> list[Picture]:
    """a.jpg and a.png beside each other are two samples: the second key gets ~2."""
    taken: set[tuple[str, str]] = set()
    unique = []
    for picture in pictures:
        key, number = picture.key, 1
        while (picture.split, key) in taken:
            number += 1
            key = f"{picture.key}~{number}"
        taken.add((picture.split, key))
        unique.append(replace(picture, key=key))
    return unique


def _divide(pictures: list[Picture], *, val_fraction: float, seed: int) -> list[Picture]:
    by_label: dict[int, list[Picture]] = {}
    for picture in pictures:
        by_label.setdefault(picture.label, []).append(picture)
    divided: list[Picture] = []
    for label, members in by_label.items():
        held_out = round(len(members) * val_fraction)
        order = permutation(len(members), bit_stream(seed, Purpose.PACKING, at=(1, label)))
        chosen = set(order[:held_out].tolist())
        divided += [replace(one, split="val") if row in chosen else one for row, one in enumerate(members)]
    return divided
