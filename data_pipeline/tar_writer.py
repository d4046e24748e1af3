"""webdataset's own tar writer, without the torch that `import webdataset` loads: 1.4 s, 190 MB a process."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import IO, Any

ALONE = "_webdataset_alone"  # another name, so that a later `import webdataset` is the whole of it


def tar_writer(file: IO[bytes]) -> Any:
    """A webdataset.TarWriter whose bytes depend on what is written only, not on the day or the user.

    PAX headers appear only where a name needs them (long or not ASCII); plain ustar would refuse it.
    """
    return _writer_module().TarWriter(file, mtime=0, format="PAX_FORMAT", encoder=False)


def _writer_module() -> ModuleType:
    if ALONE not in sys.modules:
        spec = importlib.util.find_spec("webdataset")
        assert spec is not None, "webdataset is not installed"
        assert spec.origin is not None
        package = ModuleType(ALONE)
        package.__path__ = [str(Path(spec.origin).parent)]
        sys.modules[ALONE] = package
    return importlib.import_module(f"{ALONE}.writer")
