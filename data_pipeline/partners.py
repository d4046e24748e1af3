"""Mixes the samples of a micro-batch with their partners in the global batch, wherever those are read.

Positions 2k and 2k + 1 of the global batch are partners. Most pairs fall into one micro-batch; where the cut
goes through a pair, each side reads the other's sample as well, and both see the same pixels.
Shapes: B samples of the micro-batch, E samples read only as partners.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.batch import Image, Mask, Pixels
from data_pipeline.draws import IntArray
from data_pipeline.mixing import draw_mix, mixed_image
from data_pipeline.plan import Work


class Wanted(NamedTuple):
    """What must be read for a micro-batch: its own samples first, then partners from beyond its ends."""

    numbers: IntArray  # [B + E]
    copies: IntArray  # [B + E]


def wanted(work: Work) -> Wanted:
    """The samples of `work` and the partners that are not among them."""
    copies = np.zeros_like(work.numbers) if work.copies is None else work.copies
    if work.partners is None:
        return Wanted(work.numbers, copies)
    partner_copies = np.zeros_like(work.partners) if work.partner_copies is None else work.partner_copies
    beyond = [row for row, at in enumerate(partner_rows(work).tolist()) if at >= len(work.numbers)]
    return Wanted(
        np.concatenate([work.numbers, work.partners[beyond]]),
        np.concatenate([copies, partner_copies[beyond]]),
    )


def partner_rows(work: Work) -> IntArray:
    """The row of every sample's partner, int64 [B]: below B in the micro-batch, from B on an extra one.

    The last sample of an odd global batch is its own partner.
    """
    assert work.partners is not None
    count = len(work.numbers)
    rows = np.empty(count, np.int64)
    extra = count
    for row in range(count):
        inside = ((work.first + row) ^ 1) - work.first
        if _is_itself(work, row):
            rows[row] = row
        elif 0 <= inside < count:
            rows[row] = inside
        else:
            rows[row] = extra
            extra += 1
    return rows


def _is_itself(work: Work, row: int) -> bool:
    assert work.partners is not None
    if work.partners[row] != work.numbers[row]:
        return False
    return (
        work.copies is None
        or work.partner_copies is None
        or bool(work.partner_copies[row] == work.copies[row])
    )


def mix_rows(
    work: Work,
    images: Image,
    masks: Mask | None,
    beyond: list[Pixels],
    *,
    seed: int,
    mixup: float,
    cutmix: float,
) -> NDArray[np.float32]:
    """Mix `images` [B, H, W, C] and `masks` [B, H, W] in place; what is left of each sample, float32 [B]."""
    count = len(work.numbers)
    rows = partner_rows(work).tolist()
    whole = [Pixels(images[row], None if masks is None else masks[row]) for row in range(count)] + beyond
    share = np.ones(count, np.float32)
    mixed: dict[int, Pixels] = {}
    for row in range(count):
        if rows[row] == row:
            continue
        pair = (work.first + row) // 2
        mix = draw_mix(seed, work.epoch, work.step, pair, mixup=mixup, cutmix=cutmix)
        mixed[row], share[row] = mixed_image(whole[row], whole[rows[row]], mix)
    for row, pixels in mixed.items():  # only now: each may be the other's partner
        images[row] = pixels.image
        if masks is not None and pixels.mask is not None:
            masks[row] = pixels.mask
    return share


def partner_targets(work: Work, targets: NDArray[Any]) -> NDArray[Any]:
    """The targets of the partners, in the order of the samples, from those of all that were read [B + E]."""
    chosen: NDArray[Any] = targets[partner_rows(work)]
    return chosen
