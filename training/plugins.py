"""Loads what a user brings by import path, `module:name`, from the folder where the program was started."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from data_pipeline.fault import UserError


def load_plugin(path: str, *, option: str) -> Any:
    """The object called `name` in `module`; CONFIG, naming `option`, where there is none."""
    module, _, name = path.partition(":")
    here = os.getcwd()  # noqa: PTH109 - sys.path holds text
    if here not in sys.path:
        sys.path.append(here)  # last: a file of the user's must not stand in front of a library
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{option}: cannot load {path!r}: {error}",
            mend=f"give it as module:name, with {module.partition('.')[0]}.py in '{here}' or installed",
            code="CONFIG",
        ) from error
    return found
