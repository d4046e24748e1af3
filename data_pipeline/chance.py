"""What transforms draw: choices, ranges and noise from a sample's own generator."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


# All from `Generator.random` and `random_raw`, which are fixed functions of the bit stream; `integers`,
# `normal` and the like may change with numpy.
def below(draws: np.random.Generator, count: int) -> int:
    """A whole number from 0 to `count` - 1."""
    return int(draws.random() * count)


def between(draws: np.random.Generator, low: float, high: float) -> float:
    """A number from `low` to `high`."""
    return low + (high - low) * draws.random()


def happens(draws: np.random.Generator, probability: float) -> bool:
    """Whether something of this probability happens; one draw, also where it is certain."""
    return draws.random() < probability


def order(draws: np.random.Generator, count: int) -> list[int]:
    """The numbers from 0 to `count` - 1 in random order."""
    keys = draws.random(count).tolist()
    return sorted(range(count), key=keys.__getitem__)


def noise(draws: np.random.Generator, count: int) -> NDArray[np.uint8]:
    """Independent grey levels, uint8 [count]."""
    words = draws.bit_generator.random_raw(-(-count // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[:count]
