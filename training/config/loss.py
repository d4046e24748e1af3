"""The losses that a recipe may name, alone or as a weighted sum; training.losses is what they compute."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator

from training.config.tree import Fraction, Own, Rate, Section, Spec

Weights = Literal["auto"] | tuple[Rate, ...]


class Weighted(Section):
    """What every loss of a sum has."""

    weight: Rate = 1.0
    """factor in the sum"""


class CrossEntropy(Weighted):
    """Softmax cross-entropy: one class per image or pixel."""

    label_smoothing: Fraction = 0.0
    """share of the target that is spread over all classes"""
    class_weights: Weights | None = None
    """weight of each class, in their order; auto: inverse to its frequency in the training split"""


class Bce(Weighted):
    """Binary cross-entropy of logits: many labels, or two classes of pixels with one output channel."""

    label_smoothing: Fraction = 0.0
    """targets become this much less certain: 1 - s/2 and s/2"""
    pos_weight: Weights | None = None
    """weight of each label's positives; auto: negatives per positive in the training split"""


class Focal(Weighted):
    """Cross-entropy that fades out for what is easy. Source: Lin et al. (ICCV 2017)."""

    gamma: Annotated[float, Field(ge=0, le=20, allow_inf_nan=False)] = 2.0
    """how fast it fades; 0 is cross-entropy"""
    alpha: Fraction | None = None
    """weight of positives, 1 - alpha of negatives; only where there is one output for yes and no"""


class Overlap(Weighted):
    """What losses of overlapping areas have: areas are summed over the whole global batch."""

    smooth: Rate = 1.0
    """pixels added above and below the fraction: an absent class that is not predicted costs nothing"""
    foreground: bool = False
    """leave class 0 out of the mean over classes"""


class Dice(Overlap):
    """One minus the Dice coefficient. Source: Milletari et al., V-Net (3DV 2016)."""


class Iou(Overlap):
    """One minus intersection over union, the Jaccard index."""


class Tversky(Overlap):
    """One minus the Tversky index. Source: Salehi et al. (MLMI 2017); Abraham and Khan (ISBI 2019)."""

    alpha: Rate = 0.5
    """weight of false positives"""
    beta: Rate = 0.5
    """weight of false negatives"""
    gamma: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = 1.0
    """the loss is raised to this power"""


class OwnLoss(Weighted, Own):
    """A loss of the user's, a function or a class; further names are its arguments, or its constructor's."""


class LossTerms(Spec):
    """A loss, or several that are added: `dice`, or `{bce: 0.5, dice: {weight: 0.5, smooth: 0}}`."""

    cross_entropy: CrossEntropy | None = None
    bce: Bce | None = None
    focal: Focal | None = None
    dice: Dice | None = None
    iou: Iou | None = None
    tversky: Tversky | None = None
    own: dict[str, OwnLoss] = Field(default_factory=dict)

    @classmethod
    def arguments_of(cls, written: Any) -> Any:
        """A number alone is the weight."""
        number = isinstance(written, int | float | str)
        return {"weight": written} if number else super().arguments_of(written)

    @model_validator(mode="after")
    def _at_least_one(self) -> LossTerms:
        if not self.terms and not self.own:
            raise ValueError("names no loss")
        return self

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {name: spec.model_dump() for name, spec in {**self.terms, **self.own}.items()}

    @property
    def terms(self) -> dict[str, Weighted]:
        """The losses of ours that are set, by name."""
        named = {name: getattr(self, name) for name in type(self).model_fields if name != "own"}
        return {name: spec for name, spec in named.items() if spec is not None}
