"""A folder of images beside one of masks, of the whole or of each split, paired by file name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.fault import UserError
from data_pipeline.items import Found, Source, SourceOptions, keyed
from data_pipeline.mask_names import Pairing, pair_names
from data_pipeline.picture_files import (
    PICTURE_EXTENSIONS,
    files_below,
    loose_pictures,
    split_folders,
    subfolders,
)
from data_pipeline.splitting import held_out

IMAGE_FOLDERS = ("image", "images", "img", "imgs")
MASK_FOLDERS = (
    *("mask", "masks", "label", "labels", "annotation", "annotations"),
    *("segmentation", "segmentations", "groundtruth", "ground_truth", "gt"),
)
MASK_EXTENSIONS = tuple(one for one in PICTURE_EXTENSIONS if one not in (".jpg", ".jpeg"))
SHOWN = 10


class PairFolders(NamedTuple):
    """The images and the masks of a split."""

    images: Path
    masks: Path
    split: str


class Layout(NamedTuple):
    """The folders that are read, and those of a test split that are left out for want of masks."""

    folders: list[PairFolders]
    left_out: list[Path]


def looks_like_pairs(root: Path) -> bool:
    """Whether a folder, or one of a split in it, holds a folder of images and one of masks by their names."""
    return any(
        _called(place, IMAGE_FOLDERS) and _called(place, MASK_FOLDERS)
        for place in (root, *(one.path for one in split_folders(root)))
    )


def find_pairs(root: Path, options: SourceOptions) -> Source:
    """Images with a mask each; DATA names every image without a mask and every mask without an image.

    Splits are told by folders above (train/images) or below (images/train). Where only training has masks,
    `val_fraction` of the pairs is drawn for val by the seed.
    """
    for folder in (root, options.images, options.masks):
        if folder is not None and not folder.is_dir():
            raise UserError(
                f"no folder '{folder}'", mend="give the folder of the images and that of the masks"
            )
    layout = _layout(root, options)
    pairings = [_pairing(folders) for folders in layout.folders]
    _check(layout.folders, pairings)
    divided = all(folders.split == "train" for folders in layout.folders)
    first = layout.folders[0]
    kind = f"images in {_below(root, first.images)} with masks in {_below(root, first.masks)}"
    if affix := next((pairing.affix for pairing in pairings if pairing.affix), None):
        kind += f" (named {affix.of('IMAGE')})"
    if divided:
        kind += f", {100 * options.val_fraction:g}% of them held out for val"
    else:
        kind += f", splits by folder: {', '.join(sorted({one.split for one in layout.folders}))}"
    if layout.left_out:
        kind += (
            f"; left out, as they have no masks: {', '.join(_below(root, one) for one in layout.left_out)}"
        )
    found = _found(layout.folders, pairings, options, divided=divided)
    return Source("segmentation", options.classes, keyed(found), kind)


def _found(
    folders: list[PairFolders], pairings: list[Pairing], options: SourceOptions, *, divided: bool
) -> Iterator[Found]:
    labels = np.zeros(sum(len(pairing.pairs) for pairing in pairings), np.int64)
    fraction = options.val_fraction if divided else 0.0
    drawn = iter(held_out(labels, None, val_fraction=fraction, seed=options.seed).tolist())
    for one, pairing in zip(folders, pairings, strict=True):
        for image, mask in pairing.pairs:
            split = "val" if next(drawn) else one.split
            yield Found(f"{one.images}/{image}", image, split, one.masks / mask)


def _layout(root: Path, options: SourceOptions) -> Layout:
    images = options.images or (root if options.masks else _called(root, IMAGE_FOLDERS))
    masks = options.masks or _called(root, MASK_FOLDERS)
    if images and masks:
        return _splits_below(images, masks)
    folders, left_out = [], []
    for place, split in split_folders(root):
        images, masks = _called(place, IMAGE_FOLDERS), _called(place, MASK_FOLDERS)
        if images and masks and (split != "test" or files_below(masks, extensions=MASK_EXTENSIONS)):
            folders.append(PairFolders(images, masks, split))
        elif split == "test" and (images or not masks):
            left_out.append(place)
        else:
            raise _no_folders(place)
    if not folders:
        raise _no_folders(root)
    return Layout(folders, left_out)


def _splits_below(images: Path, masks: Path) -> Layout:
    """images/train with masks/train and so on, or no splits at all."""
    splits = split_folders(images)
    if not splits or loose_pictures(images):
        return Layout([PairFolders(images, masks, "train")], [])
    by_name = {one.path.name: one.path for one in split_folders(masks)}
    by_split = {one.split: one.path for one in split_folders(masks)}
    folders, left_out = [], []
    for place, split in splits:
        there = by_name.get(place.name) or by_split.get(split)
        if there is not None:
            folders.append(PairFolders(place, there, split))
        elif split == "test":
            left_out.append(place)
        else:
            raise UserError(
                f"'{place}' holds images, but '{masks}' has no folder '{place.name}' with their masks",
                mend="put the masks into a folder of the same name, or move the images elsewhere",
            )
    if strangers := sorted(set(by_name.values()) - {one.masks for one in folders}):
        raise UserError(
            f"'{strangers[0]}' holds masks, but '{images}' has no such folder with their images",
            mend="put the images into a folder of the same name, or move the masks elsewhere",
        )
    return Layout(folders, left_out)


def _called(place: Path, names: tuple[str, ...]) -> Path | None:
    """The only folder in it that has one of these names; DATA where there are several."""
    found = [folder for folder in subfolders(place) if folder.name.lower() in names]
    if len(found) > 1:
        raise UserError(
            f"'{place}' holds '{found[0].name}' and '{found[1].name}': either may be meant",
            mend="name the folders: --images DIR, --masks DIR",
        )
    return found[0] if found else None


def _pairing(folders: PairFolders) -> Pairing:
    images = files_below(folders.images, extensions=PICTURE_EXTENSIONS)
    masks = files_below(folders.masks, extensions=PICTURE_EXTENSIONS)
    if folders.masks.is_relative_to(folders.images):
        inside = f"{folders.masks.relative_to(folders.images).as_posix()}/"
        images = [name for name in images if not name.startswith(inside)]
    for names, folder, what in ((images, folders.images, "images"), (masks, folders.masks, "masks")):
        if not names:
            other = next(iter(files_below(folder)), None)
            raise UserError(
                f"'{folder}' holds no {what}" + (f", only other files such as '{other}'" if other else ""),
                mend=f"put {what} into it, of the kinds {', '.join(PICTURE_EXTENSIONS)}",
            )
    return pair_names(images, masks)


def _check(folders: list[PairFolders], pairings: list[Pairing]) -> None:
    """Every image has one mask, every mask one image, and none is a JPEG, which blurs the values at edges."""
    wrong = []
    for one, pairing in zip(folders, pairings, strict=True):
        wrong += [
            f"the image '{one.images / name}' has no mask in '{one.masks}'" for name in pairing.unmasked
        ]
        wrong += [f"the mask '{one.masks / name}' has no image in '{one.images}'" for name in pairing.unused]
        wrong += [f"'{one.images / a}' and '{one.images / b}' share a name" for a, b in pairing.twin_images]
        wrong += [f"'{one.masks / a}' and '{one.masks / b}' share a name" for a, b in pairing.twin_masks]
        blurred = [mask for _, mask in pairing.pairs if not mask.lower().endswith(MASK_EXTENSIONS)]
        wrong += [f"the mask '{one.masks / name}' is a JPEG, which keeps no exact values" for name in blurred]
    if wrong:
        more = [f"and {len(wrong) - SHOWN:,} more like these"] if len(wrong) > SHOWN else []
        raise UserError(
            "\n".join([*wrong[:SHOWN], *more]),
            mend="every image needs one mask of the same name, as PNG, BMP or TIFF; move away what has none",
        )


def _no_folders(place: Path) -> UserError:
    return UserError(
        f"'{place}' holds no folder of images with one of masks",
        mend=f"call them {place}/images and {place}/masks, or name them: --images DIR --masks DIR",
    )


def _below(root: Path, folder: Path) -> str:
    return f"'{folder.relative_to(root) if folder.is_relative_to(root) else folder}'"
