"""The whole configuration as one frozen tree: every name a run can be told, with its unit and its limits.

Imports neither torch nor numpy, so that `--help` and a misspelt name are answered at once.
"""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveInt, model_validator

from data_pipeline.fault import UserError as UserError
from data_pipeline.fault import fatal_line as fatal_line
from data_pipeline.fault import user_error_text as user_error_text
from training.augmentation import TransformStep
from training.tree import Fraction, Rate, Section, fields_of, free

LANES_AT_MOST = 8
RECIPES = Path(__file__).parent / "recipes"
EMBEDDED_DIGITS = "embedded:digits"


class DataConfig(Section):
    """Which samples, and what is done to their pixels."""

    root: str = free("data")
    """folder or URL of dataset.json (it may move); embedded:digits is packed into data/digits on first use"""
    cache: str | None = free(None)
    """folder of this machine for the shards behind a URL; default: ~/.cache/lockstep"""
    cache_gib: float = free(64.0, gt=0, le=2**20)
    """GiB that the cache may hold; the shards used longest ago make room"""
    train_split: str = "train"
    """split to learn from"""
    val_split: str = "val"
    """split to evaluate"""
    train_transforms: tuple[TransformStep, ...] = ()
    """applied in order to training images"""
    eval_transforms: tuple[TransformStep, ...] = ()
    """applied in order to images that are evaluated"""
    lanes: PositiveInt | None = None
    """streams that a global batch is dealt from; default: greatest common divisor of global batch and 8"""
    shuffle_block: PositiveInt = 4096
    """consecutive samples of a lane that are permuted together"""
    balance: Fraction = 0.0
    """0: every sample once an epoch; 1: every class equally often in an epoch of the same length"""
    mixup: float = Field(default=0.0, ge=0, le=4)
    """alpha of the Beta distribution that two images are blended by; 0: off"""
    cutmix: float = Field(default=0.0, ge=0, le=4)
    """alpha of the Beta distribution that fixes the area pasted from another image; 0: off"""
    max_bad: Fraction = free(0.001)
    """share of the training split that may be broken and is left out, each time by the same neighbour"""
    workers: int = free(2, ge=0, le=256)
    """readers *per process*; 0 reads in the training thread"""
    worker_kind: Literal["threads", "processes"] = free("processes")
    """threads start at once and need the least CPU; processes do not share the interpreter with training"""
    prefetch: PositiveInt = free(4)
    """batches that each worker reads ahead"""

    @property
    def location(self) -> str:
        """Folder or URL where dataset.json lies, or will when the embedded set is packed."""
        return "data/digits" if self.root == EMBEDDED_DIGITS else self.root


class ModelConfig(Section):
    """The network."""

    name: str = "resnet10t"
    """a timm network"""
    pretrained: bool = False
    """start from timm's published weights instead of random ones"""


class OptimConfig(Section):
    """How weights change."""

    name: Literal["sgd", "adamw"] = "adamw"
    """update rule"""
    lr: Rate = 1e-3
    """peak learning rate"""
    weight_decay: Rate = 0.05
    """decoupled (adamw) or added to the gradient (sgd); never on biases and norms"""
    momentum: Fraction = 0.9
    """of sgd (Nesterov); first moment of adamw"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """course of the rate after the warm-up"""
    warmup_steps: int = Field(default=0, ge=0)
    """optimizer steps over which the rate rises linearly from zero"""
    final_lr: Rate = 0.0
    """rate at the end of the cosine"""
    clip_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """largest L2 norm of the whole gradient; default: not clipped"""


class TrainConfig(Section):
    """How long and in what portions."""

    global_batch: PositiveInt = 64
    """samples of one optimizer step, *all processes together*"""
    micro_batch: PositiveInt | None = free(None)
    """samples of one forward pass, *per process*, at most; default: the process's whole share"""
    epochs: PositiveInt | None = 5
    """passes over the training split; they fix the length of the schedule"""
    max_steps: PositiveInt | None = None
    """stop after this many optimizer steps; fixes the length of the schedule only where `epochs` is none"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of the forward and backward pass; weights and losses stay fp32"""
    timeout_seconds: float = free(600.0, gt=0, le=7 * 86400)
    """processes that wait longer than this for one another fail"""
    sync_batchnorm: bool = False
    """BatchNorm over the global micro-batch instead of each process's own; GPUs only"""


class EvalConfig(Section):
    """When and in what portions the validation split is scored."""

    every_epochs: PositiveInt = 1
    """passes over the training split between evaluations; the last step is always evaluated"""
    batch: PositiveInt = 128
    """samples of one forward pass; the cut does not depend on the processes"""


class CheckpointConfig(Section):
    """When the training state is saved; also after every evaluation and at the end."""

    every_steps: PositiveInt | None = free(None)
    """optimizer steps between checkpoints; default: only after evaluations"""
    keep: PositiveInt = free(2)
    """newest checkpoints kept, beside the best"""


class LogConfig(Section):
    """How much is written down."""

    every_steps: PositiveInt = free(1)
    """optimizer steps between training records in metrics.jsonl"""
    every_seconds: float = free(5.0, gt=0, le=86400)
    """seconds between progress lines where there is no terminal"""


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


class Config(Section):
    """Everything that a run can be told."""

    task: Literal["multiclass"] = "multiclass"
    """what is learned; must be the data set's task"""
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
        return self

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
