"""Pairs images and masks by the names of their files: the same, or with an addition such as _mask."""

from __future__ import annotations

from itertools import takewhile
from typing import NamedTuple

from data_pipeline.items import stem

KNOWN_SUFFIXES = (
    *("_mask", "_masks", "-mask", " mask", ".mask", "_label", "_labels", "_seg", "_segmentation"),
    *("_gt", "_annotation", "_truth", "_groundtruth"),
)
KNOWN_PREFIXES = ("mask_", "masks_", "mask-", "label_", "labels_", "seg_", "gt_")
LONGEST_AFFIX = 40
TRIED_MASKS = 200


class Affix(NamedTuple):
    """What the names of masks have before and behind those of their images."""

    prefix: str = ""
    suffix: str = ""

    def of(self, image: str) -> str:
        """The stem of the mask of an image."""
        folder, slash, base = image.rpartition("/")
        return f"{folder}{slash}{self.prefix}{base}{self.suffix}"


class Pairing(NamedTuple):
    """Images with their masks, sorted, and what has no partner or shares one; relative file names."""

    pairs: list[tuple[str, str]]
    affix: Affix | None
    unmasked: list[str]
    unused: list[str]
    twin_images: list[tuple[str, str]]
    twin_masks: list[tuple[str, str]]


def pair_names(images: list[str], masks: list[str]) -> Pairing:
    """Pair by name without extension, in the same sub-folders, under the addition that pairs most."""
    by_image, twin_images = _by_stem(images)
    by_mask, twin_masks = _by_stem(masks)
    affix = _affix(by_image, by_mask)
    wanted = {affix.of(name) if affix else name: name for name in by_image}
    pairs = [(by_image[name], by_mask[mask]) for mask, name in wanted.items() if mask in by_mask]
    unmasked = [by_image[name] for mask, name in wanted.items() if mask not in by_mask]
    unused = [name for mask, name in by_mask.items() if mask not in wanted]
    return Pairing(sorted(pairs), affix, sorted(unmasked), sorted(unused), twin_images, twin_masks)


def _by_stem(names: list[str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    by_stem: dict[str, str] = {}
    twins = []
    for name in names:
        if by_stem.setdefault(stem(name), name) != name:
            twins.append((by_stem[stem(name)], name))
    return by_stem, twins


def _affix(images: dict[str, str], masks: dict[str, str]) -> Affix | None:
    """What pairs most images with masks: the same name, else a known addition, else a common one.

    Digits alone are no addition: 11 is not the mask of 1.
    """
    tried = list(images)[:: max(1, len(images) // TRIED_MASKS)]
    if all(name in masks for name in tried):
        return None
    bases = [name.rpartition("/")[2] for name in masks]
    head = _common_head(bases)
    tail = _common_head([base[::-1] for base in bases])[::-1]
    candidates = [
        *(Affix(suffix=one) for one in KNOWN_SUFFIXES),
        *(Affix(prefix=one) for one in KNOWN_PREFIXES),
        *(Affix(suffix=tail[start:]) for start in range(len(tail))),
        *(Affix(prefix=head[: end + 1]) for end in range(len(head))),
    ]
    lettered = [one for one in candidates if any(letter.isalpha() for letter in one.prefix + one.suffix)]
    hits = [sum(one.of(name) in masks for name in tried) for one in lettered]
    plain = sum(name in masks for name in tried)
    best = max(range(len(lettered)), key=hits.__getitem__)
    return lettered[best] if hits[best] > plain else None


def _common_head(words: list[str]) -> str:
    """What all of them begin with, at most LONGEST_AFFIX letters."""
    same = takewhile(lambda letters: letters[0] == letters[1], zip(min(words), max(words), strict=False))
    return "".join(letter for letter, _ in same)[:LONGEST_AFFIX]
