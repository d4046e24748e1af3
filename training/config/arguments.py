"""Arguments that a recipe hands on to somebody else's class or function, by that one's own names."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from data_pipeline.fault import UserError

_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def numbers_read(value: Any) -> Any:
    """The value, with numbers such as 1e-6, which YAML 1.1 takes for words, read as numbers."""
    if isinstance(value, str):
        return float(value) if _NUMBER.fullmatch(value) else value
    if isinstance(value, list | tuple):
        return [numbers_read(one) for one in value]
    if isinstance(value, dict):
        return {name: numbers_read(one) for name, one in value.items()}
    return value


def checked_arguments(
    given: Mapping[str, Any], taker: Callable[..., Any], *, option: str, elsewhere: Mapping[str, str]
) -> dict[str, Any]:
    """What is given to `taker`, read; CONFIG names every argument that it does not take.

    `option` is where they were written; `elsewhere` names the option of each that has one of its own.
    """
    known = [name for name in inspect.signature(taker).parameters if name not in elsewhere]
    mistakes = []
    for name in given:
        if name in elsewhere:
            mistakes.append(f"{option}: {name} has an option of its own: {elsewhere[name]}")
        elif name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            mistakes.append(f"{option}: {taker.__name__} takes no {name!r}{meant}")
    if mistakes:
        raise UserError("\n".join(mistakes), mend=f"it takes {', '.join(known)}", code="CONFIG")
    return {name: numbers_read(value) for name, value in given.items()}
