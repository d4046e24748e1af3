"""Writes tensors as safetensors files, byte for byte as the library would, and finds their SHA-256 meanwhile.

The library's own writer cannot be asked for the checksum, so the file would have to be read again; it leaves
the mode at 0600 and pushes nothing to the disk. Here a thread for each file computes its checksum while this
one writes: both the system's write and hashlib leave Python's lock alone meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_pipeline.disk import write_files
from training.checkpoints.priority import step_back

Tensors = Mapping[str, torch.Tensor]

# Files begin with the kinds that come last here: the order of the library's list of kinds.
KINDS: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_RANK = {kind: rank for rank, kind in enumerate(reversed(KINDS))}


# In levels of priority: the disk must not wait for a core that computes checksums.
BEHIND_WRITING = 5


class Listed(NamedTuple):
    """What a manifest says of a file."""

    size: int  # bytes
    sha256: str  # in hex


def write_tensors(folder: Path, files: Mapping[str, Tensors]) -> dict[str, Listed]:
    """Write contiguous tensors in host memory to files, through to the disk; the files' sizes and SHA-256.

    Format: github.com/huggingface/safetensors. OSError as the system raises it; ValueError for a kind of
    number that the format does not know.
    """
    pieces = {file: _pieces(tensors) for file, tensors in files.items()}
    sizes = {file: sum(map(len, content)) for file, content in pieces.items()}
    with ThreadPoolExecutor(max(1, len(files)), "checksum") as pool:
        digests = {
            # The largest takes longest; the others can do with the time that the disk takes.
            file: pool.submit(_sha256_of, pieces[file], behind=BEHIND_WRITING if rank else 0)
            for rank, file in enumerate(sorted(sizes, key=sizes.__getitem__, reverse=True))
        }
        write_files({folder / file: content for file, content in pieces.items()})
        return {file: Listed(sizes[file], digests[file].result()) for file in files}


def _pieces(tensors: Tensors) -> list[bytes | memoryview]:
    ordered = sorted(tensors.items(), key=lambda item: (_rank(*item), item[0]))
    return [_header(ordered), *(_bytes_of(tensor) for _, tensor in ordered)]


def _rank(name: str, tensor: torch.Tensor) -> int:
    if tensor.dtype not in _RANK:
        raise ValueError(f"{name!r} is of {tensor.dtype}, which safetensors files cannot hold")
    return _RANK[tensor.dtype]


def _header(ordered: Iterable[tuple[str, torch.Tensor]]) -> bytes:
    described: dict[str, dict[str, Any]] = {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        kind, shape = KINDS[tensor.dtype], list(tensor.shape)
        described[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the numbers behind it begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    assert tensor.is_contiguous(), "a snapshot is"
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _sha256_of(pieces: Iterable[bytes | memoryview], *, behind: int) -> str:
    step_back(behind)
    digest = sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
