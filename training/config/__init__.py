"""The whole configuration as one frozen tree: every name a run can be told, with its unit and its limits.

Imports neither torch nor numpy, so that `--help` and a misspelt name are answered at once.
"""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from data_pipeline.fault import UserError as UserError
from data_pipeline.fault import fatal_line as fatal_line
from data_pipeline.fault import user_error_text as user_error_text
from training.config.data import EMBEDDED_DIGITS as EMBEDDED_DIGITS
from training.config.data import DataConfig
from training.config.loss import LossTerms
from training.config.model import ModelConfig
from training.config.optim import OptimConfig
from training.config.train import CheckpointConfig, TrainConfig
from training.config.tree import Section, fields_of, free

LANES_AT_MOST = 8
GRAINS_AT_LEAST = 8  # where `train.grain` leaves it to us, and the global batch can be cut so
RECIPES = Path(__file__).parent.parent / "recipes"


class EvalConfig(Section):
    """When and in what portions the validation split is scored."""

    every_epochs: PositiveInt = 1
    """passes over the training split between evaluations; the last step is always evaluated"""
    batch: PositiveInt = 128
    """samples of one forward pass; the cut does not depend on the processes"""
    best: str | None = None
    """score that chooses the best weights; default: accuracy, auroc or dice, by task"""
    bootstrap: NonNegativeInt = free(1000)
    """resamples that the intervals of `evaluate` come from (many labels only); 0: no intervals"""


class LogConfig(Section):
    """How much is written down."""

    every_steps: PositiveInt = free(1)
    """optimizer steps between training records in metrics.jsonl"""
    every_seconds: float = free(5.0, ge=0, le=86400)
    """seconds between progress lines where there is no terminal; 0: a line every step, there too"""


class TrackingConfig(Section):
    """Where else records go."""

    wandb: Literal["disabled", "offline", "online"] = free("disabled")
    """Weights & Biases; `offline` writes into the run directory"""
    project: str = free("lockstep", min_length=1, max_length=128)
    """project name there"""


class DebugConfig(Section):
    """Proofs, for those who want to see them."""

    batch_digest: Literal["none", "keys", "pixels"] = free("none")
    """order-free digest of each global batch in metrics.jsonl: of its keys, or of keys, pixels and targets"""


class PredictConfig(Section):
    """What `predict` reads and writes."""

    source: str | None = free(None)
    """a data set, a folder of pictures, a picture, or a list of them: .txt, or .csv with a column of paths"""
    out: str | None = free(None)
    """a .csv, .jsonl or .parquet file; masks: a folder; default: predictions.csv or predictions/ in RUN"""
    split: str | None = free(None)
    """split of a data set; default: data.val_split"""
    top_k: NonNegativeInt = free(0)
    """one class per picture: the k likeliest classes instead of a column for each"""
    scores: Literal["probabilities", "logits"] = free("probabilities")
    """what the columns hold"""
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = free(None)
    """probability from which a label or pixel is found; default: chosen on the validation split, else 0.5"""
    tta: Literal["none", "horizontal", "flips"] = free("none")
    """average over the picture and its mirror image, or over all four flips"""
    overlay: bool = free(True)
    """masks: also write each picture with its mask drawn over it"""


class Config(Section):
    """Everything that a run can be told."""

    task: Literal["multiclass", "multilabel", "segmentation"] = "multiclass"
    """what is learned; must be the data set's task"""
    loss: LossTerms = LossTerms.model_validate("cross_entropy")
    """a loss or a weighted sum, such as {bce: 0.5, dice: 0.5}; default: cross_entropy; multilabel: bce"""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """fixes the order of samples, their augmentation and the initial weights"""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    tracking: TrackingConfig = TrackingConfig()
    debug: DebugConfig = DebugConfig()
    predict: PredictConfig = PredictConfig()

    @model_validator(mode="before")
    @classmethod
    def _loss_of_the_task(cls, written: Any) -> Any:
        if not isinstance(written, dict) or written.get("loss") not in (None, "none"):
            return written
        return {**written, "loss": "bce" if written.get("task") == "multilabel" else "cross_entropy"}

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.train.epochs is None and self.train.max_steps is None:
            raise ValueError("train.epochs and train.max_steps are both none; one of them must end the run")
        if self.task != "multiclass" and self.data.balance:
            raise ValueError(f"data.balance {self.data.balance} balances classes, which only multiclass has")
        if self.train.global_batch % self.lanes:
            raise ValueError(
                f"data.lanes {self.lanes} must divide train.global_batch {self.train.global_batch}"
            )
        self._check_exact()
        return self

    def _check_exact(self) -> None:
        train = self.train
        if not train.exact and train.grain:
            raise ValueError(f"train.grain {train.grain} is for exact mode only: set train.exact true")
        if train.exact and train.global_batch % self.grain:
            raise ValueError(f"train.grain {self.grain} must divide train.global_batch {train.global_batch}")
        for name in ("micro_batch", "sync_batchnorm"):
            if train.exact and (value := getattr(train, name)):
                raise ValueError(
                    f"train.{name} {value} does not go with exact mode, which computes grain by grain: "
                    f"leave it out (train.grain sets their size)"
                )

    @property
    def grain(self) -> int:
        """Samples of a grain of exact mode, also where `train.grain` leaves it to us."""
        return self.train.grain or self.train.global_batch // gcd(self.train.global_batch, GRAINS_AT_LEAST)

    @property
    def grains(self) -> int:
        """Grains of a global batch in exact mode, else 0."""
        return self.train.global_batch // self.grain if self.train.exact else 0

    @property
    def lanes(self) -> int:
        """Lanes of the plan, also where `data.lanes` leaves it to us."""
        return self.data.lanes or gcd(self.train.global_batch, LANES_AT_MOST)

    def as_yaml(self) -> str:
        """The resolved configuration as text: config.yaml, and what --print-config prints."""
        text: str = yaml.safe_dump(self.model_dump(mode="json", exclude_unset=False), sort_keys=False)
        return text


def recipe_names() -> list[str]:
    """The recipes that come with lockstep."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def changed(before: dict[str, Any], config: Config) -> list[str]:
    """The keys that decide what is learned and differ: "train.global_batch: 64 -> 128"."""
    after = config.model_dump(mode="json")
    decisive = [name for name, field in fields_of(Config) if not (field.json_schema_extra or {}).get("free")]
    if config.train.epochs is not None:
        # Then it only ends the run: the schedule's length comes from the epochs.
        decisive.remove("train.max_steps")
    pairs = ((name, _at(before, name), _at(after, name)) for name in decisive)
    return [f"{name}: {old} -> {new}" for name, old, new in pairs if old != new]


def _at(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
