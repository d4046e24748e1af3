"""Tensors out of files that others wrote: safetensors, and torch's format where it holds only tensors."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data_pipeline.fault import UserError, first_line

TORCH_FILES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
# Where programs put the state dict inside what they save.
WRAPPERS = ("state_dict", "model_state_dict", "model", "network")

Tensors = dict[str, torch.Tensor]


def read_weights_file(path: Path, *, option: str) -> Tensors:
    """Name -> tensor, on the CPU, of a state dict, or of the state dict inside a saved training state.

    Nothing in the file is run. UNSAFE if it holds more than tensors and plain values; CONFIG if it is not
    there, is damaged, or holds no tensors.
    """
    if not path.is_file():
        raise _refused(
            f"{option}: there is no file '{path}'", mend="give the path of a .safetensors or .pth file"
        )
    if path.suffix == ".safetensors":
        found: Any = _read_safetensors(path, option)
    elif path.name.endswith(TORCH_FILES):
        found = _read_torch(path, option)
    else:
        raise _refused(
            f"{option}: '{path}' is neither .safetensors nor {', '.join(TORCH_FILES)}",
            mend="save the network with safetensors.torch.save_file(network.state_dict(), FILE.safetensors)",
        )
    tensors = _tensors_in(found)
    if not tensors:
        raise _refused(
            f"{option}: '{path}' holds no named tensors",
            mend="give a file with a state dict: torch.save(network.state_dict(), FILE.pth)",
        )
    return tensors


def _read_safetensors(path: Path, option: str) -> Tensors:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, option, error) from error


def _read_torch(path: Path, option: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever strange bytes lead to
        text = str(error)
        # The class itself is in a module that nothing here imports.
        refused = type(error).__name__ == "UnpicklingError" and _written_by_torch(path)
        if not refused and "TorchScript" not in text:
            raise _unreadable(path, option, error) from error
        culprit = re.search(r"GLOBAL (\S+)", text)
        raise UserError(
            f"{option}: '{path}' holds more than tensors"
            + (f" ({culprit[1]})" if culprit else "")
            + ", and reading it could run a stranger's code",
            mend="where you trust the file, save its state dict alone: "
            "safetensors.torch.save_file(network.state_dict(), FILE.safetensors)",
            code="UNSAFE",
        ) from error


def _written_by_torch(path: Path) -> bool:
    """A zip archive, or, as before torch 1.6, a pickle of the second protocol."""
    with path.open("rb") as file:
        return zipfile.is_zipfile(path) or file.read(1) == b"\x80"


def _tensors_in(found: Any) -> Tensors:
    """The named tensors of what a file held, out of as many wrappers as there are."""
    if not isinstance(found, Mapping):
        return {}
    for wrapper in WRAPPERS:
        inner = _tensors_in(found.get(wrapper))
        if inner:
            return inner
    # A Parameter would bring its gradient flag along.
    return {str(name): value.detach() for name, value in found.items() if isinstance(value, torch.Tensor)}


def _unreadable(path: Path, option: str, error: Exception) -> UserError:
    return _refused(
        f"{option}: cannot read '{path}': {first_line(error)}",
        mend="get the file again: it is cut off, damaged or of another format than its name says",
    )


def _refused(what: str, *, mend: str) -> UserError:
    return UserError(what, mend=mend, code="CONFIG")
