"""What `predict` reads: a data set, or pictures that lie about, through the same pipeline as training."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from data_pipeline.fault import UserError
from data_pipeline.file_reader import PictureList
from data_pipeline.index import DATASET_FILE, DatasetIndex, Split
from data_pipeline.items import utf8
from data_pipeline.picture_source import find_pictures
from data_pipeline.produce import Recipe
from data_pipeline.shard_index import read_shard_index
from data_pipeline.store import Store, load_dataset
from data_pipeline.unframing import fixes_size
from data_pipeline.urls import check_url, is_remote, local_path
from training.config import EMBEDDED_DIGITS, Config
from training.hardware import local_processes
from training.prediction.mask_names import mask_names
from training.tasks.task import Task


@dataclass(frozen=True)
class Predictor:
    """A network and all that model.json says of how it is used."""

    path: Path
    kind: str  # one of data_pipeline.index.TASKS
    network: torch.nn.Module  # bare
    task: Task
    classes: tuple[str, ...]
    image_mode: str  # "L" or "RGB"
    mean: tuple[float, ...]  # of pixels in 0..1, per channel
    std: tuple[float, ...]
    transforms: tuple[tuple[str, dict[str, Any]], ...]  # names and parameters, in order
    mask_values: tuple[int, ...] = ()  # [C] grey value of each class of pixels
    thresholds: tuple[float, ...] | None = None  # [C], chosen on the validation split for these very weights

    @property
    def makes_masks(self) -> bool:
        """Whether it classifies pixels."""
        return self.kind == "segmentation"


@dataclass(frozen=True)
class PredictionInputs:
    """The samples in their order; `identity` differs where any of them does."""

    recipe: Recipe
    samples: int
    batch: int  # samples of one forward pass, at most
    identity: str
    words: str
    mask_name: Callable[[int], str]  # of a sample's number; for no other task


def open_inputs(config: Config, saved: Predictor, *, pinned: bool) -> PredictionInputs:
    """Find what `predict.source` names; UserError where it is nothing that can be read."""
    source = config.predict.source
    if source is None:
        raise UserError(
            "predict.source: nothing is named to predict on",
            mend="give --predict.source: a data set, a folder of pictures, a picture, or a list of them",
            code="USAGE",
        )
    place = check_url(_embedded(source))
    # Of os.path, for which a name that is too long is not there, instead of an error.
    if is_remote(place) or os.path.exists(local_path(place) / DATASET_FILE):  # noqa: PTH110
        return _of_dataset(config, saved, place, pinned=pinned)
    if config.predict.split is not None:
        raise UserError(
            f"predict.split: {config.predict.split!r}, but '{source}' is no data set, so it has no splits",
            mend="leave --predict.split out, or give a data set",
            code="USAGE",
        )
    return _of_pictures(config, saved, local_path(place), pinned=pinned)


def _embedded(source: str) -> str:
    if source != EMBEDDED_DIGITS:
        return source
    from data_pipeline.digits import ensure_digits  # packing is needed once in the life of a data set

    folder = Path("data/digits")
    ensure_digits(folder)
    return str(folder)


def _of_dataset(config: Config, saved: Predictor, place: str, *, pinned: bool) -> PredictionInputs:
    data = config.data
    cache = Path(data.cache) if data.cache else None
    dataset, store = load_dataset(place, cache=cache, cache_bytes=int(data.cache_gib * 2**30))
    split = config.predict.split or data.val_split
    if split is None or split not in dataset.splits:
        raise UserError(
            f"predict.split: '{place}' has no split {split!r}" if split else "predict.split: none is named",
            mend=f"give one that it has: --predict.split {' or '.join(dataset.splits)}",
        )
    # Its pictures are read as those of training were, whatever it says of its own task.
    read = replace(
        dataset, classes=saved.classes, image_mode=saved.image_mode, mean=saved.mean, std=saved.std
    )
    return PredictionInputs(
        Recipe(store, read, split, **_reading(config, saved, pinned=pinned)),
        dataset.split(split).samples,
        _batch(config, saved),
        f"{dataset.identity()} {split}",
        f"split {split!r} of '{place}'",
        mask_names(_keys(store, dataset.split(split)) if saved.makes_masks else ()),
    )


def _of_pictures(config: Config, saved: Predictor, source: Path, *, pinned: bool) -> PredictionInputs:
    pictures = find_pictures(source)
    mode, values = saved.image_mode, saved.mask_values
    dataset = DatasetIndex(saved.kind, saved.classes, mode, saved.mean, saved.std, {}, mask_values=values)
    return PredictionInputs(
        Recipe(pictures, dataset, "", **_reading(config, saved, pinned=pinned)),
        len(pictures.names),
        _batch(config, saved),
        _identity(pictures),
        f"'{utf8(str(source))}'",
        mask_names(pictures.names if saved.makes_masks else ()),
    )


def _keys(store: Store, split: Split) -> list[str]:
    """All keys in order; tars that others made may have one of them twice."""
    indexes = (read_shard_index(store.index_path(shard), shard) for shard in split.shards)
    return [key for index in indexes for key in index.keys]


def _reading(config: Config, saved: Predictor, *, pinned: bool) -> dict[str, Any]:
    return {
        "transforms": saved.transforms,
        "seed": config.seed,
        "pinned": pinned,
        "sharers": local_processes(),
        "unlabelled": True,
    }


def _batch(config: Config, saved: Predictor) -> int:
    """Pictures of different sizes go through the network one by one."""
    return 1 if saved.makes_masks and not fixes_size(saved.transforms) else config.eval.batch


def _identity(pictures: PictureList) -> str:
    digest = sha256()
    for name in pictures.names:
        encoded = os.fsencode(name)
        digest.update(b"%d:%s" % (len(encoded), encoded))
    return digest.hexdigest()
