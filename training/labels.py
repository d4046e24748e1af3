"""Counts what there is of each class in the training split, for losses that weigh classes by it."""

from __future__ import annotations

import numpy as np

from data_pipeline.index import DatasetIndex
from data_pipeline.shard_index import read_shard_index
from training.config import Config
from training.losses import Labels, outputs_of
from training.reading import open_data_store


def learned_labels(config: Config, dataset: DatasetIndex) -> Labels:
    """What the network of this run learns to tell; the same on every process."""
    split = dataset.split(config.data.train_split)
    positives = split.class_counts
    # A sample has one class, a picture's known pixels have one each; of many labels each sample has each.
    whole = split.samples if dataset.task == "multilabel" else sum(positives)
    negatives = tuple(whole - count for count in positives)
    if dataset.task == "multilabel" and _weighs_by_frequency(config):
        negatives = _known_negatives(config, dataset)
    return Labels(
        task=dataset.task,
        classes=len(dataset.classes),
        outputs=outputs_of(dataset.task, len(dataset.classes), config.loss),
        positives=positives,
        negatives=negatives,
    )


def _weighs_by_frequency(config: Config) -> bool:
    return config.loss.bce is not None and config.loss.bce.pos_weight == "auto"


def _known_negatives(config: Config, dataset: DatasetIndex) -> tuple[int, ...]:
    """Samples of each label that are known not to have it, counted in the index: no tar is read."""
    store, counts = open_data_store(config, dataset), np.zeros(len(dataset.classes), np.int64)
    for shard in dataset.split(config.data.train_split).shards:
        counts += (read_shard_index(store.index_path(shard), shard).labels == 0).sum(axis=0)
    return tuple(counts.tolist())
