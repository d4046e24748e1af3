"""The transforms that a recipe may name, with their parameters; data_pipeline.transforms is what they do."""

from __future__ import annotations

from typing import Any

from pydantic import model_serializer, model_validator

from training.config.transform_parameters import (
    Affine,
    ColorJitter,
    Elastic,
    Filling,
    GaussianBlur,
    Pad,
    Perhaps,
    Posterize,
    QuarterTurn,
    RandAugment,
    RandomCrop,
    RandomErasing,
    RandomGrayscale,
    RandomResizedCrop,
    RandomShift,
    ResizedCenterCrop,
    ResizeTo,
    Rotation,
    Sharpness,
    Sized,
    Solarize,
)
from training.config.tree import Section


class TransformStep(Section):
    """One line of a list of transforms: `- {name: {parameter: value}}`; exactly one name is set."""

    resize: Sized | None = None
    """Scale so that the shorter side has this size."""
    resize_to: ResizeTo | None = None
    resized_center_crop: ResizedCenterCrop | None = None
    random_resized_crop: RandomResizedCrop | None = None
    center_crop: Sized | None = None
    """Cut the centre."""
    random_crop: RandomCrop | None = None
    pad: Pad | None = None
    random_shift: RandomShift | None = None
    horizontal_flip: Perhaps | None = None
    """Mirror left and right."""
    vertical_flip: Perhaps | None = None
    """Mirror top and bottom."""
    quarter_turn: QuarterTurn | None = None
    rotation: Rotation | None = None
    affine: Affine | None = None
    elastic: Elastic | None = None
    color_jitter: ColorJitter | None = None
    random_grayscale: RandomGrayscale | None = None
    gaussian_blur: GaussianBlur | None = None
    sharpness: Sharpness | None = None
    posterize: Posterize | None = None
    solarize: Solarize | None = None
    invert: Perhaps | None = None
    """Invert every level."""
    autocontrast: Perhaps | None = None
    """Stretch each channel to all levels."""
    equalize: Perhaps | None = None
    """Make all levels of a channel equally frequent."""
    rand_augment: RandAugment | None = None
    trivial_augment: Filling | None = None
    """One random operation of random strength."""
    random_erasing: RandomErasing | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_parameters(cls, written: Any) -> Any:
        """`- name:` is written for `- name: {}`."""
        if not isinstance(written, dict):
            return written
        return {name: {} if parameters is None else parameters for name, parameters in written.items()}

    @model_validator(mode="after")
    def _one_name(self) -> TransformStep:
        names = sorted(self.model_fields_set)
        if len(names) != 1:
            raise ValueError(f"one transform a line, here are {len(names)}: {', '.join(names)}")
        return self

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        name, parameters = self.call
        return {name: parameters}

    @property
    def call(self) -> tuple[str, dict[str, Any]]:
        """The transform's name and its parameters."""
        (name,) = self.model_fields_set
        return name, getattr(self, name).model_dump()
