"""The transforms that a recipe may name, with their parameters; data_pipeline.transforms is what they do."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_serializer, model_validator

from training.tree import Fraction, Section

Size = Annotated[int, Field(gt=0, le=16384)]


class Sized(Section):
    """A transform that makes one size."""

    size: Size
    """pixels"""


class RandomShift(Section):
    """Move by whole pixels."""

    fraction: Fraction
    """of each side, at most"""


class RandomResizedCrop(Sized):
    """Cut a random rectangle and scale it."""

    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """least and greatest share of the area"""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """least and greatest width / height"""


class HorizontalFlip(Section):
    """Mirror left and right."""

    probability: Fraction = 0.5
    """of mirroring"""


class TransformStep(Section):
    """One line of a list of transforms: `- {name: {parameter: value}}`; exactly one name is set."""

    resize: Sized | None = None
    center_crop: Sized | None = None
    random_shift: RandomShift | None = None
    random_resized_crop: RandomResizedCrop | None = None
    horizontal_flip: HorizontalFlip | None = None

    @model_validator(mode="after")
    def _one_name(self) -> TransformStep:
        if len(self.model_fields_set) != 1:
            raise ValueError(
                f"one transform a line, here are {len(self.model_fields_set)}: {self.model_fields_set}"
            )
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
