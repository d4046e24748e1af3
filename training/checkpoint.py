"""Saves the training state so that a kill at any instruction leaves a whole checkpoint, and finds it again.

    checkpoints/step-00001000/  model.safetensors  optimizer.safetensors  state.json  MANIFEST.json

A checkpoint is written into a hidden sibling; each file is fsynced; MANIFEST.json (size and SHA-256 of each)
comes last; then the folder is renamed and its parent fsynced; only then are old ones pruned. So a folder
without the temporary prefix is whole, and one whose bytes have changed since is found out by its manifest.
Training waits only while tensors are copied to host memory; a thread does the rest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data_pipeline.disk import file_sha256, fsync_file

FORMAT = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"
WEIGHTS = ".safetensors"
TEMPORARY = "."  # prefix of a folder that is being written or removed

Tensors = Mapping[str, torch.Tensor]


class CheckpointWriter:
    """Writes checkpoints of one run below `folder`, keeping the newest `keep` and those that `keeps` names.

    Host buffers are allocated once and reused: fresh memory costs several times what the copy does.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._buffers: dict[str, dict[str, torch.Tensor]] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        files: Mapping[str, Tensors],
        state: dict[str, Any],
        *,
        best_step: int | None,
        then: Callable[[Path], None],
    ) -> None:
        """Copy the tensors and write them in the background; `then` gets the committed folder.

        Waits for the checkpoint before this one, and raises what went wrong with it (OSError).
        """
        self.wait()
        for file, tensors in files.items():
            self._copy(self._buffers.setdefault(file, {}), tensors)
        snapshot = {
            file: {name: self._buffers[file][name] for name in tensors} for file, tensors in files.items()
        }
        protected = {step, best_step}

        def write() -> None:
            try:
                committed = write_checkpoint(self._folder, step, snapshot, state)
                then(committed)
                prune(self._folder, keep=self._keep, protected=protected)
            except BaseException as error:  # raised by `wait` in the thread that trains
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint-writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is committed; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @staticmethod
    def _copy(buffers: dict[str, torch.Tensor], tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name not in buffers or buffers[name].shape != tensor.shape:
                pinned = tensor.device.type == "cuda"
                buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            buffers[name].copy_(tensor, non_blocking=True)
        if any(tensor.device.type == "cuda" for tensor in tensors.values()):
            torch.cuda.synchronize()


def write_checkpoint(folder: Path, step: int, files: Mapping[str, Tensors], state: dict[str, Any]) -> Path:
    """Write and commit one checkpoint by the protocol above; the committed folder."""
    committed = folder / f"step-{step:08d}"
    part = folder / f"{TEMPORARY}{committed.name}.part"
    if committed.exists():  # no start writes a step twice, and what a start found damaged it has set aside
        set_aside(committed, f"aside-{committed.name}.")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _fill(part, step, files, state)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)  # what cannot be finished must not take room from what can
        raise
    part.rename(committed)
    fsync_file(folder)
    return committed


def _fill(part: Path, step: int, files: Mapping[str, Tensors], state: dict[str, Any]) -> None:
    for file, tensors in files.items():
        write_tensors(part / file, tensors)
    write_json(part / STATE, {"format": FORMAT, **state})
    described = {
        path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(part.iterdir())
    }
    write_json(part / MANIFEST, {"format": FORMAT, "step": step, "files": described})
    fsync_file(part)


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file through to the disk, with the mode that the umask asks for (not 0600)."""
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # it wraps what the system said
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        needed = sum(tensor.nbytes for tensor in tensors.values())
        said = f"{os.strerror(int(number[1]))}, {needed:,} bytes needed"
        raise OSError(int(number[1]), said, str(path)) from None
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    fsync_file(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON through to the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def prune(folder: Path, *, keep: int, protected: set[int | None]) -> None:
    """Remove what was left half-written or half-removed, and all but the newest `keep` and `protected`."""
    for leftover in folder.glob(f"{TEMPORARY}step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in checkpoints(folder)[keep:]:
        if step_of(path) not in protected:
            _remove(path)


def _remove(path: Path) -> None:
    """Rename first: a kill in the middle must not leave a folder that looks like a checkpoint."""
    leaving = path.with_name(f"{TEMPORARY}{path.name}.old")
    shutil.rmtree(leaving, ignore_errors=True)
    path.rename(leaving)
    shutil.rmtree(leaving)


def checkpoints(folder: Path) -> list[Path]:
    """Folders named like a checkpoint, newest step first, by name and never by date."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isascii() and path.name[5:].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name[5:])


def newest_verified(folder: Path, *, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose every byte is as its manifest says; `say` hears why a newer one is not."""
    for path in checkpoints(folder):
        fault = verify(path)
        if fault is None:
            return path
        say(f"checkpoint {path.name} is not whole ({fault}); trying the one before it")
    return None


def set_aside(path: Path, name: str) -> Path:
    """Rename a folder to `name` and the first free number; somebody may still want what is in the way."""
    number = 1
    while (aside := path.with_name(f"{name}{number}")).exists():
        number += 1
    return path.rename(aside)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        files = {str(name): (int(one["size"]), str(one["sha256"])) for name, one in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST}: {error!r}"
    if strangers := [name for name in files if Path(name).name != name]:
        return f"{MANIFEST} names a file outside its folder: {strangers[0]!r}"
    if STATE not in files or not any(name.endswith(WEIGHTS) for name in files):
        return f"{MANIFEST} lists no {STATE} or no tensors"
    faults = (_fault_of(path / name, size, sha256) for name, (size, sha256) in files.items())
    return next((fault for fault in faults if fault is not None), None)


def _fault_of(file: Path, size: int, sha256: str) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != size:
        return f"{file.name} has {file.stat().st_size} bytes instead of {size}"
    return None if file_sha256(file) == sha256 else f"the content of {file.name} has changed"


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a verified checkpoint."""
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    return state


def read_tensors(path: Path, file: str) -> dict[str, torch.Tensor]:
    """The tensors of one file of a verified checkpoint, on the CPU."""
    return load_file(path / file)
