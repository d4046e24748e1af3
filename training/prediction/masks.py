"""Makes the mask of a picture in its own size and, drawn over the picture, the overlay.

Shapes: O outputs, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage

from data_pipeline.batch import Image
from data_pipeline.overlay import laid_over
from data_pipeline.unframing import Back
from training.prediction.mask_names import OVERLAYS
from training.prediction.rows import Cell, Column, Said, not_finite, numbers
from training.prediction.views import Answers


class Paper(NamedTuple):
    """Where masks are written, and how: the grey value [C] and the colour of each class."""

    folder: Path
    values: Sequence[int]
    colours: dict[int, tuple[int, int, int]]
    temporary: Path  # in the same folder; no other process writes it


def mask_columns(classes: Sequence[str]) -> list[Column]:
    """The mask's file, and the share of pixels of each class."""
    return [Column("mask", "text"), *(Column(name, "number", of_class=True) for name in classes)]


def mask_said(name: str, classes_HW: NDArray[np.uint8] | None, classes: int) -> Said:
    """The cells of `mask_columns`; None stands for a mask that cannot be made."""
    if classes_HW is None:
        return not_finite(1 + classes)
    counts = np.bincount(classes_HW.ravel(), minlength=classes)
    shares: list[Cell] = numbers((counts / classes_HW.size).astype(np.float32))
    return Said([name, *shares])


def said_classes(
    answers: Answers, row: int, back: Sequence[Back], threshold: float | None
) -> NDArray[np.uint8] | None:
    """The class of each pixel of one picture, uint8 [H, W], in the picture's own size.

    The class of the largest score; of a single output, class 1 where its probability reaches the threshold,
    without one where it is above one half. Where there is a way back to go, probabilities are interpolated
    bilinearly on it, before the decision. None where an output is not finite.
    """
    by_probability = bool(back) or threshold is not None
    found_OHW = (answers.probabilities if by_probability else answers.ranking)[row]
    if not bool(torch.isfinite(found_OHW).all()):
        return None
    for step in back:
        found_OHW = _stepped_back(found_OHW, step)
    if found_OHW.shape[0] > 1:
        classes_HW = found_OHW.argmax(dim=0)
    elif threshold is not None:
        classes_HW = found_OHW[0] >= threshold
    else:
        classes_HW = found_OHW[0] > (0.5 if by_probability else answers.even)
    return classes_HW.to(torch.uint8).cpu().numpy()


def write_mask(name: str, classes_HW: NDArray[np.uint8], picture: Image | None, paper: Paper) -> None:
    """Write the mask, and the overlay where there is a picture uint8 [H, W, 3]; each appears as a whole."""
    values = np.array(paper.values, np.uint8)[classes_HW]
    _write(PillowImage.fromarray(values), paper.folder / name, paper.temporary)
    if picture is not None:
        overlay = laid_over(PillowImage.fromarray(picture), classes_HW, paper.colours)
        _write(overlay, paper.folder / OVERLAYS / name, paper.temporary)


def _write(picture: PillowImage.Image, path: Path, temporary: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(temporary, format="PNG")
    temporary.replace(path)


def _stepped_back(found_OHW: torch.Tensor, step: Back) -> torch.Tensor:
    height, width = step.kept
    kept_OHW = found_OHW[:, step.top : step.top + height, step.left : step.left + width]
    if step.size == step.kept:
        return kept_OHW
    return torch.nn.functional.interpolate(kept_OHW[None], size=step.size, mode="bilinear")[0]
