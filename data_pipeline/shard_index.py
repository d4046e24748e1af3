"""Where every member of one tar lies, so that a sample is one pread; read lazily, a row at a time.

Shapes: R rows (samples) of a shard, M kinds of member (extensions), C labels.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_arrays

from data_pipeline.disk import replace_file
from data_pipeline.fault import UserError
from data_pipeline.index import FORMAT, Shard

MISSING = -1  # a label of a multilabel sample that nobody gave
ARRAYS = {"offset": "U64", "size": "U64", "crc32": "U32", "key_ends": "U64", "keys": "U8"}
LABELS = ("I32", "I8")
NUMPY_TYPES = {"U64": "<u8", "U32": "<u4", "U8": "<u1", "I32": "<i4", "I8": "<i1"}


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The members of one tar, and the labels. A member that a sample lacks has offset 0 (headers come first).

    `labels` is int32 [R] (multiclass: class numbers), int8 [R, C] (multilabel: 1, 0, or -1 where one is
    missing) or int8 [R, 0] (segmentation: the target is the mask).
    """

    extensions: list[str]  # [M], sorted
    offset: NDArray[np.uint64]  # [R, M] bytes from the start of the tar
    size: NDArray[np.uint64]  # [R, M] bytes
    crc32: NDArray[np.uint32]  # [R, M] of the member's bytes
    labels: NDArray[Any]
    key_ends: NDArray[np.uint64]  # [R] cumulative lengths of the keys in bytes
    key_bytes: NDArray[np.uint8]  # all keys, UTF-8

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, row: int) -> str:
        """The key of a sample."""
        first = int(self.key_ends[row - 1]) if row else 0
        return self.key_bytes[first : int(self.key_ends[row])].tobytes().decode()

    @cached_property
    def keys(self) -> list[str]:
        """All keys, [R]."""
        return [self.key(row) for row in range(len(self))]

    def column(self, extensions: tuple[str, ...], row: int) -> int | None:
        """The column of the first of `extensions` that this sample has; None where it has none of them."""
        for extension in extensions:
            if extension in self.extensions:
                column = self.extensions.index(extension)
                if self.offset[row, column]:
                    return column
        return None


Place = tuple[int, int, int]  # of one member: offset and size in bytes, CRC-32


def make_shard_index(rows: dict[str, dict[str, Place]], labels: NDArray[Any]) -> ShardIndex:
    """An index of key -> extension -> place, with the labels of the keys in their order."""
    extensions = sorted({extension for row in rows.values() for extension in row})
    absent = (0, 0, 0)
    table = np.array([[row.get(name, absent) for name in extensions] for row in rows.values()], np.uint64)
    table = table.reshape(len(rows), len(extensions), 3)
    encoded = [key.encode() for key in rows]
    return ShardIndex(
        extensions,
        np.ascontiguousarray(table[..., 0]),
        np.ascontiguousarray(table[..., 1]),
        table[..., 2].astype(np.uint32),
        labels,
        np.cumsum([len(key) for key in encoded], dtype=np.uint64),
        np.frombuffer(b"".join(encoded), np.uint8),
    )


def write_shard_index(path: Path, index: ShardIndex) -> str:
    """Write an index as a safetensors file: arrays by name, reading it runs nothing. Its SHA-256 in hex."""
    arrays: dict[str, NDArray[Any]] = {
        "offset": index.offset,
        "size": index.size,
        "crc32": index.crc32,
        "labels": np.ascontiguousarray(index.labels),
        "key_ends": index.key_ends,
        "keys": index.key_bytes,
    }
    # One metadata entry only: safetensors writes several in an order that changes from process to process.
    about = json.dumps({"format": FORMAT, "extensions": index.extensions})
    content = save_arrays(arrays, metadata={"lockstep": about})
    replace_file(path, lambda part: part.write_bytes(content))
    return sha256(content).hexdigest()


def read_shard_index(path: Path, shard: Shard) -> ShardIndex:
    """Map the index of `shard`; DATA where it is missing, damaged, or does not fit the shard.

    The whole file is read once, for its checksum, but what stays in memory is the rows that are asked for.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if sha256(mapped).hexdigest() != shard.index_sha256:
            raise ValueError("its SHA-256 is not the one in dataset.json")
        index = _parsed(mapped)
        shape = (shard.samples, len(index.extensions))
        if len(index) != shard.samples or len(index.labels) != shard.samples:
            raise ValueError(f"{len(index)} samples, where dataset.json has {shard.samples}")
        if any(array.shape != shape for array in (index.offset, index.size, index.crc32)):
            raise ValueError("its arrays are of different lengths")
        if np.any(index.key_ends[1:] < index.key_ends[:-1]) or np.any(
            index.key_ends[-1:] != index.key_bytes.size
        ):
            raise ValueError("its keys do not end where they should")
        if bool(np.any(index.size > shard.bytes) or np.any(index.offset > shard.bytes - index.size)):
            raise ValueError("a member ends behind the end of its tar")
    except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot use the index '{path}': {error}",
            mend="copy it again from where it was whole, or make it again: lockstep pack, or lockstep index",
            place={"shard": shard.name},
        ) from None
    return index


def _parsed(mapped: mmap.mmap) -> ShardIndex:
    """The arrays of a safetensors file without reading them: the format is a length, JSON, then the bytes."""
    length = int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8 : 8 + length])
    about = json.loads(header["__metadata__"]["lockstep"])
    if about["format"] != FORMAT:
        raise ValueError(f"it has format {about['format']}, this version reads format {FORMAT}")
    arrays = {name: _array(mapped, 8 + length, header[name]) for name in (*ARRAYS, "labels")}
    for name, kind in ARRAYS.items():
        if header[name]["dtype"] != kind:
            raise ValueError(f"{name} is {header[name]['dtype']}, not {kind}")
    if header["labels"]["dtype"] not in LABELS:
        raise ValueError(f"labels are {header['labels']['dtype']}, not one of {', '.join(LABELS)}")
    return ShardIndex(
        list(map(str, about["extensions"])),
        arrays["offset"],
        arrays["size"],
        arrays["crc32"],
        arrays["labels"],
        arrays["key_ends"],
        arrays["keys"],
    )


def _array(mapped: mmap.mmap, start: int, about: dict[str, Any]) -> NDArray[Any]:
    first, last = about["data_offsets"]
    kind = np.dtype(NUMPY_TYPES[about["dtype"]])
    if not 0 <= first <= last <= len(mapped) - start:
        raise ValueError("an array ends behind the end of the file")
    return np.frombuffer(mapped, kind, (last - first) // kind.itemsize, start + first).reshape(about["shape"])
