"""Names the mask of each picture: in the same folders below the output, under the same stem, as PNG.

Where several pictures would get one mask, the first gets it and the others keep their extension:
a.jpg and a.png give a.png and a.png.png; after that come a.png~2.png, a.png~3.png.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from data_pipeline.draws import hash64, repeated
from data_pipeline.items import utf8
from data_pipeline.picture_files import PICTURE_EXTENSIONS

OVERLAYS = "overlays"  # the folder of pictures with their masks drawn over them


def mask_of(name: str) -> str:
    """The mask of a picture, relative to the folder of all masks, which it never leaves.

    What would lead out is left away: ../a.jpg and /a.jpg both become a.png.
    """
    *folders, last = _inside(name)
    stem, extension = os.path.splitext(last)  # noqa: PTH122 - a name, not a path of this machine
    return "/".join(
        [*map(_folder, folders), (stem if extension.lower() in PICTURE_EXTENSIONS else last) + ".png"]
    )


def mask_names(names: Sequence[str]) -> Callable[[int], str]:
    """The mask of each picture by its number, no two the same; the same on every process.

    Names are compared by their 64-bit hashes: there may be ten million of them.
    """
    plain = np.fromiter((_hash(mask_of(name)) for name in names), np.uint64, len(names))
    twins = set(repeated(plain).tolist())
    if not twins:
        return lambda number: mask_of(names[number])
    taken, known = set[int](), np.sort(plain)
    others: dict[int, str] = {}
    for number in np.flatnonzero(np.isin(plain, list(twins))).tolist():
        if (hashed := int(plain[number])) not in taken:
            taken.add(hashed)
            continue
        whole = "/".join([*map(_folder, _inside(names[number])[:-1]), _inside(names[number])[-1]])
        others[number] = _free(
            whole, taken, lambda one: known[np.searchsorted(known, one) % len(known)] == one
        )
    return lambda number: others.get(number) or mask_of(names[number])


def _free(whole: str, taken: set[int], is_known: Callable[[np.uint64], bool]) -> str:
    number = 1
    while True:
        name = f"{whole}.png" if number == 1 else f"{whole}~{number}.png"
        hashed = _hash(name)
        if hashed not in taken and not is_known(np.uint64(hashed)):
            taken.add(hashed)
            return name
        number += 1


def _inside(name: str) -> list[str]:
    """The folders and the file of a name, without what leads out of the folder."""
    parts = [part for part in utf8(name).replace("\0", "").split("/") if part not in ("", ".", "..")]
    return parts or ["~"]


def _folder(name: str) -> str:
    """A folder that is neither that of the overlays nor called like a mask."""
    return f"{name}~" if name.lower() == OVERLAYS or name.lower().endswith(".png") else name


def _hash(name: str) -> int:
    return hash64(name.encode())
