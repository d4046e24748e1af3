"""Lets torchvision be imported beside a CPU-only torch, for which no torchvision build is published."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

_kept_alive: list[object] = []  # a torch.library.Library takes its schemas with it when it is collected


def declare_missing_operators() -> None:
    """Declare the two operators that `import torchvision` needs and that its CUDA extension did not bring.

    The Linux wheel of torchvision is a CUDA build. Beside a CPU-only torch its extension cannot be loaded,
    and `import torchvision` then fails with "operator torchvision::nms does not exist" (its
    _meta_registrations.py registers fakes for operators that are not there). With `nms` and `qnms` declared,
    transforms, models and datasets work; `torchvision.ops.nms` itself and `torchvision.io` do not, and
    lockstep uses neither.

    Called by torch at the end of its own import (entry point group `torch.backends`). Never raises: a failure
    here would be reported as a broken torch.
    """
    try:
        import torch

        if torch.version.cuda or torch.version.hip or _kept_alive or not _extension_cannot_load():
            return
        make: Any = torch.library.Library  # torch leaves it untyped
        library = make("torchvision", "FRAGMENT")
        _kept_alive.append(library)
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except Exception:
        return  # torch must come up; `import torchvision` will say itself what is wrong


def _extension_cannot_load() -> bool:
    """Whether torchvision is installed with an extension that the dynamic linker refuses."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    extensions = sorted(Path(spec.origin).parent.glob("_C*.so"))
    if not extensions:
        return True
    try:
        ctypes.CDLL(str(extensions[0]))
    except OSError:
        return True
    return False
