"""What lies beside the tars: dataset.json for the whole, an index per shard so that a sample is one pread.

Shapes: R rows (samples) of a shard, M kinds of member (extensions).
"""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from data_pipeline.disk import replace_file
from data_pipeline.draws import IntArray
from data_pipeline.fault import UserError

FORMAT = 1
DATASET_FILE = "dataset.json"
SHARD_NAME = re.compile(r"[^/\0]+\.tar", re.DOTALL)
# WebDataset's convention: the key is the path up to the first dot of the file name, the rest the extension.
MEMBER_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$", re.DOTALL)


@dataclass(frozen=True)
class Shard:
    """One tar of a split: file name, samples in it, its size in bytes and its SHA-256 in hex."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of one split in order, samples of each class, the digest of all keys (16 hex digits)."""

    shards: tuple[Shard, ...]
    class_counts: tuple[int, ...]
    keys_digest: str

    @cached_property
    def shard_samples(self) -> IntArray:
        """int64 [S], samples of each shard."""
        return np.array([shard.samples for shard in self.shards], np.int64)

    @property
    def samples(self) -> int:
        """Samples of the split."""
        return int(self.shard_samples.sum())


@dataclass(frozen=True)
class DatasetIndex:
    """What dataset.json holds. `mean` and `std` are per channel of the training pixels scaled to 0..1."""

    task: str
    classes: tuple[str, ...]
    image_mode: str  # "L" (one channel) or "RGB"
    mean: tuple[float, ...]
    std: tuple[float, ...]
    splits: dict[str, Split]

    @property
    def channels(self) -> int:
        """Channels of a decoded image."""
        return 1 if self.image_mode == "L" else 3

    def identity(self) -> str:
        """SHA-256 in hex of everything that decides which samples a run sees."""
        return sha256(json.dumps(_as_json(self), sort_keys=True).encode()).hexdigest()

    def split(self, name: str) -> Split:
        """The named split; DATA where there is none."""
        if name not in self.splits:
            raise UserError(f"the data set has no split {name!r}", mend=f"it has: {', '.join(self.splits)}")
        return self.splits[name]


class ShardIndex(NamedTuple):
    """Where every member of one tar lies. A missing one has offset 0 (a tar header precedes the data)."""

    keys: list[str]  # [R]
    extensions: list[str]  # [M], sorted
    offset: NDArray[np.uint64]  # [R, M] bytes from the start of the tar
    size: NDArray[np.uint64]  # [R, M] bytes
    crc32: NDArray[np.uint32]  # [R, M] of the member's bytes


def write_dataset(root: Path, dataset: DatasetIndex) -> None:
    """Write dataset.json, atomically: its presence says that the data set is complete."""
    text = json.dumps(_as_json(dataset), indent=1, ensure_ascii=False) + "\n"
    replace_file(root / DATASET_FILE, lambda part: part.write_text(text, encoding="utf-8"))


def read_dataset(root: Path) -> DatasetIndex:
    """Read dataset.json; DATA where there is none or it is damaged, UNSAFE where a shard leaves `root`."""
    path = root / DATASET_FILE
    try:
        dataset = _from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        where = "it holds no dataset.json" if root.is_dir() else "there is no such folder"
        raise UserError(
            f"no data set at '{root}': {where}",
            mend=f"make one from your pictures: lockstep pack PICTURES {root}",
        ) from None
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot use '{path}': {error}", mend="pack the data set again") from None
    names = [shard.name for split in dataset.splits.values() for shard in split.shards]
    if strangers := [name for name in names if not SHARD_NAME.fullmatch(name)]:
        raise UserError(
            f"'{path}' names a shard that is no tar in its folder: {strangers[0]!r}",
            mend="pack the data set again, or do not use it",
            code="UNSAFE",
        )
    return dataset


def _as_json(dataset: DatasetIndex) -> dict[str, Any]:
    counts = {name: split.samples for name, split in dataset.splits.items()}
    return {"format": FORMAT, **asdict(dataset), "counts": counts}


def _from_json(raw: dict[str, Any]) -> DatasetIndex:
    if raw["format"] != FORMAT:
        raise ValueError(f"it has format {raw['format']}, this version reads format {FORMAT}")
    mean, std = tuple(map(float, raw["mean"])), tuple(map(float, raw["std"]))
    splits = {name: _split_from_json(split) for name, split in raw["splits"].items()}
    dataset = DatasetIndex(raw["task"], tuple(raw["classes"]), raw["image_mode"], mean, std, splits)
    if dataset.image_mode not in ("L", "RGB") or not len(mean) == len(std) == dataset.channels:
        raise ValueError(
            f"image mode {dataset.image_mode!r} with {len(mean)} means and {len(std)} deviations"
        )
    if any(len(split.class_counts) != len(dataset.classes) for split in splits.values()):
        raise ValueError(f"{len(dataset.classes)} classes, but not as many counts in each split")
    return dataset


def _split_from_json(raw: dict[str, Any]) -> Split:
    shards = tuple(
        Shard(str(one["name"]), int(one["samples"]), int(one["bytes"]), str(one["sha256"]))
        for one in raw["shards"]
    )
    return Split(shards, tuple(map(int, raw["class_counts"])), str(raw["keys_digest"]))


def index_tar(path: Path) -> ShardIndex:
    """Index a tar by one sequential read; DATA where a key repeats a member or a name has no extension."""
    rows: dict[str, dict[str, tuple[int, int, int]]] = {}
    with tarfile.open(path, "r:") as tar, path.open("rb") as data:
        for member in tar:
            if not member.isreg():
                continue
            match = MEMBER_NAME.match(member.name)
            if match is None:
                raise UserError(
                    f"'{path}': member {member.name!r} has no extension", mend="name members KEY.EXTENSION"
                )
            key, extension = match.groups()
            row = rows.setdefault(key, {})
            if extension in row:
                raise UserError(
                    f"'{path}': member {member.name!r} is there twice", mend="give each sample its own key"
                )
            data.seek(member.offset_data)
            row[extension] = (member.offset_data, member.size, zlib.crc32(data.read(member.size)))
    extensions = sorted({extension for row in rows.values() for extension in row})
    absent = (0, 0, 0)
    table = np.array([[row.get(name, absent) for name in extensions] for row in rows.values()], np.uint64)
    table = table.reshape(len(rows), len(extensions), 3)
    return ShardIndex(list(rows), extensions, table[..., 0], table[..., 1], table[..., 2].astype(np.uint32))


def index_path(shard: Path) -> Path:
    """The index that belongs to a tar: the same name with .idx."""
    return shard.with_suffix(".idx")


def write_shard_index(path: Path, index: ShardIndex) -> None:
    """Write an index as a safetensors file: arrays by name; reading it runs nothing."""
    encoded = [key.encode() for key in index.keys]
    arrays: dict[str, NDArray[Any]] = {
        "offset": np.ascontiguousarray(index.offset),
        "size": np.ascontiguousarray(index.size),
        "crc32": np.ascontiguousarray(index.crc32),
        "key_ends": np.cumsum([len(key) for key in encoded], dtype=np.uint64),
        "keys": np.frombuffer(b"".join(encoded), np.uint8),
    }
    # One metadata entry only: safetensors writes several in an order that changes from process to process.
    about = json.dumps({"format": FORMAT, "extensions": index.extensions})
    replace_file(path, lambda part: part.write_bytes(save_arrays(arrays, metadata={"lockstep": about})))


def read_shard_index(path: Path, shard: Shard) -> ShardIndex:
    """Read the index of `shard`; DATA where it is missing, damaged, or does not fit the shard beside it."""
    try:
        raw = path.read_bytes()
        arrays = load_arrays(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        about = json.loads(header["__metadata__"]["lockstep"])
        ends = [0, *arrays["key_ends"].tolist()]
        blob = arrays["keys"].tobytes()
        keys = [blob[first:last].decode() for first, last in pairwise(ends)]
        index = ShardIndex(keys, about["extensions"], arrays["offset"], arrays["size"], arrays["crc32"])
        shape = (shard.samples, len(index.extensions))
        if len(keys) != shard.samples or any(array.shape != shape for array in index[2:]):
            raise ValueError(f"{len(keys)} samples, where dataset.json has {shard.samples}")
        if bool(np.any(index.size > shard.bytes) or np.any(index.offset > shard.bytes - index.size)):
            raise ValueError("a member ends behind the end of its tar")
    except (OSError, LookupError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"cannot use the index '{path}': {error}",
            mend="pack the data set again",
            place={"shard": shard.name},
        ) from None
    return index
