"""Writes the training state so that a kill at any instruction leaves a whole checkpoint, and finds it again.

    checkpoints/step-00001000/  model.safetensors  optimizer.safetensors  state.json  MANIFEST.json

A checkpoint is written into a hidden sibling; each file is fsynced; MANIFEST.json (size and SHA-256 of each)
comes last; all is read back; the folder is renamed and its parent fsynced; only then are old ones pruned. So
a folder without the temporary prefix is whole, and one whose bytes have changed since is found out by its
manifest.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from data_pipeline.disk import fsync_file, make_folder, remove_folder, rename
from training.checkpoints.manifest import FORMAT, STATE, fault_of, patiently, write_json, write_manifest
from training.checkpoints.manifest import MANIFEST as MANIFEST
from training.checkpoints.manifest import verify as verify
from training.checkpoints.tensor_file import Tensors, write_tensors

LEFTOVER = re.compile(r"\.step-\d{8,}\.(part|old)", re.ASCII)  # being written, being removed


def write_checkpoint(folder: Path, step: int, files: Mapping[str, Tensors], state: dict[str, Any]) -> Path:
    """Write, read back and commit one checkpoint by the protocol above; the committed folder.

    `files` are tensors in host memory that nobody changes meanwhile. OSError where it cannot be written or
    does not read back: nothing of it is left then, as far as the disk allows that.
    """
    committed = folder / f"step-{step:08d}"
    part = folder / f".{committed.name}.part"
    if committed.exists():  # no start writes a step twice, and what a start found damaged it has set aside
        set_aside(committed, f"aside-{committed.name}.")
    if part.exists():
        remove_folder(part)
    try:
        make_folder(part)
        _fill(part, step, files, state)
        if fault := fault_of(part):
            raise OSError(errno.EIO, f"what was written reads back differently: {fault}", str(part))
        rename(part, committed)
        fsync_file(folder)
    except BaseException:
        _undo(part, committed)
        raise
    return committed


def _undo(part: Path, committed: Path) -> None:
    """What nobody was told of must neither take room from what can be written nor pass for whole."""
    with contextlib.suppress(OSError):
        if committed.exists():
            rename(committed, part)
        remove_folder(part)


def _fill(part: Path, step: int, files: Mapping[str, Tensors], state: dict[str, Any]) -> None:
    listed = write_tensors(part, files)
    listed[STATE] = write_json(part / STATE, {"format": FORMAT, **state})
    write_manifest(part, step, listed)
    fsync_file(part)


def remove_checkpoint(path: Path) -> None:
    """Rename first: a kill or a power cut in the middle must not leave what looks like a checkpoint."""
    leaving = path.with_name(f".{path.name}.old")
    if leaving.exists():
        remove_folder(leaving)
    rename(path, leaving)
    fsync_file(path.parent)
    remove_folder(leaving)


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill left half-written or half-removed, and nothing else; OSError where that fails."""
    for path in sorted(folder.glob(".step-*")):
        if LEFTOVER.fullmatch(path.name) and not path.is_symlink():
            remove_folder(path)


def checkpoints(folder: Path) -> list[Path]:
    """Folders named like a checkpoint, newest step first, by name and never by date."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isascii() and path.name[5:].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name[5:])


def newest_verified(folder: Path, *, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose every byte is as its manifest says; `say` hears why a newer one is not.

    RESUME where a later version wrote it: it is not damaged, and what it holds must not be trained again.
    """
    for path in checkpoints(folder):
        fault = verify(path)
        if fault is None:
            return path
        say(f"checkpoint {path.name} is not whole ({fault})")
    return None


def set_aside(path: Path, name: str) -> Path:
    """Rename a folder to `name` and the first free number; somebody may still want what is in the way."""
    number = 1
    while (aside := path.with_name(f"{name}{number}")).exists():
        number += 1
    rename(path, aside)
    return aside


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a verified checkpoint."""
    state: dict[str, Any] = json.loads(patiently(path, (path / STATE).read_bytes))
    return state


def read_tensors(path: Path, file: str) -> dict[str, torch.Tensor]:
    """The tensors of one file of a verified checkpoint, on the CPU."""
    return patiently(path, lambda: load_file(path / file))
