"""A folder of pictures per class, below the root or below train/, val/ and test/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.fault import UserError
from data_pipeline.items import Found, Source, SourceOptions, keyed, utf8
from data_pipeline.picture_files import (
    PICTURE_EXTENSIONS,
    SplitFolder,
    files_below,
    loose_pictures,
    split_folders,
    subfolders,
)
from data_pipeline.splitting import held_out


class ClassFolder(NamedTuple):
    """The pictures of one class in one split, relative to its folder."""

    path: Path
    split: str
    pictures: list[str]


def find_class_folders(root: Path, options: SourceOptions) -> Source:
    """A folder per class, below `root` or below train/, val/ and test/; DATA where there is nothing to learn.

    Where only training has classes, each of them is divided by itself, by ratio and seed. Pictures that lie
    in no class's folder are left out, and `kind` says so.
    """
    if not root.is_dir():
        raise UserError(
            f"no folder '{root}'", mend="give the folder that holds one folder of pictures per class"
        )
    splits = split_folders(root)
    parents = splits or [SplitFolder(root, "train")]
    folders = [
        ClassFolder(folder, parent.split, files_below(folder, extensions=PICTURE_EXTENSIONS))
        for parent in parents
        for folder in subfolders(parent.path)
    ]
    _check(root, parents, folders)
    names = _class_names(folders, options.classes)
    divided = all(folder.split == "train" for folder in folders)
    kind = "a folder per class"
    if splits:
        kind += f" inside {', '.join(one.path.name for one in splits)}"
    if divided:
        kind += f", {100 * options.val_fraction:g}% of each class held out for val"
    loose = {parent.path.name: len(loose_pictures(parent.path)) for parent in parents}
    if any(loose.values()):
        found = ", ".join(f"{count:,} in {name}" for name, count in loose.items() if count)
        kind += f"; left out, as they lie in no folder of a class: pictures ({found})"
    items = keyed(_found(folders, names, options, divided=divided))
    return Source("multiclass", tuple(map(utf8, names)), items, kind)


def _check(root: Path, parents: list[SplitFolder], folders: list[ClassFolder]) -> None:
    mend = f"put the pictures of each class into a folder of its own: {parents[0].path}/CLASS/picture.jpg"
    if not subfolders(root):
        loose = len(loose_pictures(root))
        found = f"holds {loose:,} pictures, but" if loose else "is empty: it holds"
        raise UserError(f"'{root}' {found} no folder of pictures", mend=mend)
    for folder in folders:
        if not folder.pictures and folder.split == "train":  # in the other splits a class may well be absent
            raise UserError(
                f"the class folder '{folder.path}' holds no pictures ({', '.join(PICTURE_EXTENSIONS)})",
                mend="put pictures into it or remove it",
            )
    if all(folder.split != "train" for folder in folders):
        raise UserError(f"'{root}' holds no folder of a class for training", mend=mend)


def _class_names(folders: list[ClassFolder], wanted: tuple[str, ...]) -> tuple[str, ...]:
    """In the order that is wanted, else sorted; DATA where a folder is not among those that are wanted."""
    there = {folder.path.name: folder.path for folder in folders}
    if not wanted:
        return tuple(sorted(there))
    if strangers := sorted(there.keys() - set(wanted)):
        raise UserError(
            f"the folder '{there[strangers[0]]}' is none of the classes {', '.join(wanted)}",
            mend="name it among the classes, move it elsewhere, or name no classes",
        )
    return wanted


def _found(
    folders: list[ClassFolder], names: tuple[str, ...], options: SourceOptions, *, divided: bool
) -> Iterator[Found]:
    number = {name: label for label, name in enumerate(names)}
    labels = np.repeat(
        np.array([number[folder.path.name] for folder in folders], np.int64),
        [len(folder.pictures) for folder in folders],
    )
    fraction = options.val_fraction if divided else 0.0
    drawn = iter(held_out(labels, None, val_fraction=fraction, seed=options.seed).tolist())
    for folder in folders:
        label = number[folder.path.name]
        for picture in folder.pictures:
            split = "val" if next(drawn) else folder.split
            yield Found(f"{folder.path}/{picture}", f"{folder.path.name}/{picture}", split, label)
