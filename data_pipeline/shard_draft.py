"""What came of reading one foreign tar, as plain data: kept on the disk until all tars have been read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.draws import repeated
from data_pipeline.fault import UserError

NAMED = 10  # keys that a message lists


class Lacking(NamedTuple):
    """The samples that lack something: how many, and the keys of the first."""

    samples: int = 0
    keys: tuple[str, ...] = ()


NOTHING = Lacking()


def lacking(keys: list[str]) -> Lacking:
    """Of all their keys."""
    return Lacking(len(keys), tuple(keys[:NAMED]))


@dataclass(frozen=True)
class Draft:
    """Small however large the tar is; [N] runs over the names (classes, labels) that are found in it.

    `counts` [N] are samples (multiclass) or ones (multilabel), `given` [N] what is not missing, `first` [N]
    the key of a sample of each class; `pixels` [256] those of each raw value of its masks.
    """

    name: str
    samples: int = 0
    bytes: int = 0
    sha256: str = ""
    index_sha256: str = ""  # of the drafted index
    keys_digest: int = 0  # the sum of the keys' hashes modulo 2**64
    names: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    given: tuple[int, ...] = ()
    first: tuple[str, ...] = ()
    pixels: tuple[int, ...] = ()
    images: tuple[str, ...] = ()  # extensions
    ignored: dict[str, int] = field(default_factory=dict)
    no_image: Lacking = NOTHING
    no_target: Lacking = NOTHING


@dataclass(frozen=True)
class DraftFiles:
    """The files of the drafts in their folder."""

    folder: Path

    def index(self, shard: str) -> Path:
        """The drafted index of a tar, its labels numbered by the names found in it."""
        return self.folder / f"{shard}.idx"

    def hashes(self, shard: str) -> Path:
        """The hashes of its keys, sorted, 8 bytes each."""
        return self.folder / f"{shard}.keys"

    def write(self, draft: Draft | UserError, shard: str) -> None:
        """Keep what came of a tar: its draft, or what is wrong with it."""
        if isinstance(draft, UserError):
            raw = {"what": draft.what, "mend": draft.mend, "code": draft.code, "place": draft.place}
        else:
            raw = asdict(draft)
        (self.folder / f"{shard}.json").write_text(json.dumps(raw), encoding="utf-8")

    def read(self, shard: str) -> Draft | UserError:
        """What `write` was given."""
        raw: dict[str, Any] = json.loads((self.folder / f"{shard}.json").read_text(encoding="utf-8"))
        if "what" in raw:
            return UserError(raw.pop("what"), **raw)
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()
        }
        plain |= {name: Lacking(raw[name][0], tuple(raw[name][1])) for name in ("no_image", "no_target")}
        return Draft(**plain)

    def repeated_hashes(self, shards: Iterable[str], *, at_once: int) -> NDArray[np.uint64]:
        """The hashes that are there more than once, in memory for about `at_once` of them."""
        files = [file for file in map(self.hashes, shards) if file.exists()]
        parts = -(-sum(file.stat().st_size for file in files) // (8 * at_once))
        edges: list[int | None] = [part * (2**64 // parts) for part in range(parts)]
        found = [np.empty(0, np.uint64)]
        for first, behind in zip(edges, [*edges[1:], None], strict=True):
            found.append(repeated(np.concatenate([_between(file, first, behind) for file in files])))
        return np.concatenate(found)


def _between(file: Path, first: int | None, behind: int | None) -> NDArray[np.uint64]:
    """The hashes of a file in a range; mapped one file at a time, because mappings are limited, too."""
    table = np.memmap(file, np.uint64, "r")
    return np.array(table[_place(table, first) : _place(table, behind)])


def _place(table: NDArray[np.uint64], edge: int | None) -> int:
    return len(table) if edge is None else int(np.searchsorted(table, np.uint64(edge)))
