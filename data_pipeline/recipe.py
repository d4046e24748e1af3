"""Everything between a sample's number and its pixels, as one object that every reader worker gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_pipeline.file_reader import FileReader, PictureList
from data_pipeline.index import DatasetIndex
from data_pipeline.read import ShardReader
from data_pipeline.store import Store


@dataclass(frozen=True)
class Recipe:
    """Where samples lie, what is done to them, the seed."""

    store: Store | PictureList
    dataset: DatasetIndex
    split: str  # of nothing, where the store is a list of pictures
    transforms: tuple[tuple[str, dict[str, Any]], ...]  # name and parameters, in order
    seed: int
    pinned: bool = False  # page-locked buffers, for a GPU
    mixup: float = 0.0  # alpha of the Beta distribution; 0: off
    cutmix: float = 0.0
    skip_bad: bool = True  # put a neighbour in the place of a broken sample, instead of raising
    sharers: int = 1  # processes of this machine whose shards go through the same cache
    # To predict: neither labels nor masks are read, and a broken sample leaves its row black.
    unlabelled: bool = False


def reader_of(recipe: Recipe) -> ShardReader | FileReader:
    """What reads the samples of a recipe by their numbers."""
    if isinstance(recipe.store, PictureList):
        return FileReader(recipe.store)
    return ShardReader(recipe.store, recipe.dataset, recipe.split, targets=not recipe.unlabelled)
