"""Which name of a file is which name of a network, whatever wrappers put in front of either."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "network.", "net.")
_IN_SEQUENCE = re.compile(r"^(\w+)\.(\d+)\.")  # of `stages.0.`
_FLAT = re.compile(r"^\w+_\d+\.")  # `stages_0.`, which timm makes of it in a network that gives features

Shapes = Mapping[str, torch.Size]


class Renaming(NamedTuple):
    """A name of the file loses `strip` and gets `add`; `flat` writes stages.0. as stages_0."""

    strip: str = ""
    add: str = ""
    flat: bool = False

    def __call__(self, name: str) -> str | None:
        """The network's name for it; None if it does not begin with `strip`."""
        if not name.startswith(self.strip):
            return None
        inner = name.removeprefix(self.strip)
        return self.add + (_IN_SEQUENCE.sub(r"\1_\2.", inner) if self.flat else inner)

    def words(self) -> str:
        """What it does, for a report; empty if it does nothing."""
        stripped = f"'{self.strip}' taken off" if self.strip else ""
        added = f"'{self.add}' put before" if self.add else ""
        return " and ".join(part for part in (stripped, added) if part)


def best_renaming(file: Shapes, network: Shapes) -> Renaming:
    """The one that makes most names of the file names of the network; then most shapes; then the smallest."""

    def worth(renaming: Renaming) -> tuple[int, int, int, bool]:
        pairs = {renaming(name): shape for name, shape in file.items()}
        common = pairs.keys() & network.keys()
        same = sum(pairs[name] == network[name] for name in common if name is not None)
        return len(common), same, -len(renaming.strip + renaming.add), not renaming.flat

    return max(
        (
            Renaming(strip, add, flat)
            for strip in _chains(file)
            for add in _chains(network)
            for flat in (
                (False, True) if any(_FLAT.match(one.removeprefix(add)) for one in network) else (False,)
            )
        ),
        key=worth,
    )


def _chains(names: Iterable[str]) -> list[str]:
    """Every sequence of known prefixes that a name begins with, the empty one first."""
    names = list(names)
    found = [""]
    for chain in found:
        longer = [chain + prefix for prefix in PREFIXES]
        found += [one for one in longer if any(name.startswith(one) for name in names)]
    return found
