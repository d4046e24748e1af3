"""Patterns for parameters: by whole names, by modules, or as head and body."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from itertools import accumulate


def matches(pattern: str, name: str, *, head: frozenset[str]) -> bool:
    """Whether the pattern means a parameter: by its name, by a module that it is in, as head or as body."""
    if pattern in ("head", "body"):
        return (name in head) == (pattern == "head")
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def with_modules(names: Iterable[str]) -> list[str]:
    """The dotted names of parameters and of the modules that they are in, each once, outermost first."""
    paths = (name.split(".") for name in names)
    return list(dict.fromkeys(".".join(path) for parts in paths for path in accumulate([p] for p in parts)))
