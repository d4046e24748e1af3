"""Random numbers as a pure function of what they are for: no state to save, none to share between threads."""

from __future__ import annotations

import hashlib
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


class Purpose(IntEnum):
    """What a generator is drawn for, so that no two uses of one seed ever share a stream."""

    SHARD_ORDER = 0
    ROTATION = 1
    BLOCK_ORDER = 2
    AUGMENTATION = 3
    PACKING = 4
    MIXING = 5
    BALANCE = 6


def bit_stream(
    seed: int, purpose: Purpose, epoch: int = 0, *, at: tuple[int, int] = (0, 0)
) -> np.random.Philox:
    """A Philox stream keyed by (seed, purpose, epoch) that starts at the counter `at`.

    The low two words of the counter are left to the stream (2**128 draws), so streams of different `at` never
    meet.
    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
    """
    return np.random.Philox(key=[seed, epoch << 8 | purpose], counter=[0, 0, *at])


def permutation(count: int, stream: np.random.Philox) -> IntArray:
    """A permutation of range(count), int64 [count].

    By sorting raw 64-bit draws: numpy promises the bits of a bit generator for ever, but not what
    `Generator.permutation` makes of them, and a run must find its order again under another numpy.
    """
    order: IntArray = np.argsort(stream.random_raw(count), kind="stable").astype(np.int64, copy=False)
    return order


def repeated(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The values that are there more than once, ascending."""
    ordered = np.sort(hashes)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def hash64(*parts: bytes) -> int:
    """64-bit BLAKE2b of the concatenated parts; sums of these modulo 2**64 are the order-free digests."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")
