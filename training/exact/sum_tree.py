"""The one order in which the grains of a global batch are added up, whoever has computed them.

G grains are 2**k blocks of an odd number of grains. A block is added one after the other, and the blocks are
halved: the sum of the first half plus that of the second. W processes, where W is a power of two that divides
G, have G/W consecutive grains each, which is a subtree; the tree above is over processes.
"""

from __future__ import annotations

from typing import NamedTuple


class Landing(NamedTuple):
    """Where the gradient of one grain goes, on a stack of buffers."""

    buffer: int
    fresh: bool  # it overwrites the buffer; else it is added to what is there
    merges: int  # how often the topmost buffer is then added to the one below it


def odd_part(grains: int) -> int:
    """What is left of a number that is halved as long as it is even."""
    return grains // (grains & -grains)


def process_counts(grains: int) -> list[int]:
    """The numbers of processes that can share so many grains without another sum, ascending."""
    return [1 << power for power in range((grains // odd_part(grains)).bit_length())]


def landings(grains: int) -> list[Landing]:
    """The landings of a process's grains in their order; at the end the sum of all is in buffer 0.

    A binary counter: after b blocks there is a partial sum on the stack for each 1 in b. A block of one grain
    that is to be added to the buffer below goes there at once.
    """
    size = odd_part(grains)
    found = []
    for block in range(grains // size):
        depth, carries = block.bit_count(), (block ^ (block + 1)).bit_length() - 1
        if size == 1 and carries:
            found.append(Landing(depth - 1, fresh=False, merges=carries - 1))
            continue
        found += [Landing(depth, fresh=number == 0, merges=0) for number in range(size - 1)]
        found.append(Landing(depth, fresh=size == 1, merges=carries))
    return found
