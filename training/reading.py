"""What a run reads: its data set, the order of the samples, and the stream of its micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from data_pipeline.balance import Balance, class_table
from data_pipeline.batch import Batch
from data_pipeline.fault import UserError
from data_pipeline.index import DatasetIndex
from data_pipeline.plan import Plan, Work, training_work
from data_pipeline.produce import Recipe
from data_pipeline.shard_index import read_shard_index
from data_pipeline.store import Store, load_dataset, open_store
from data_pipeline.stream import stream
from training.config import EMBEDDED_DIGITS, Config
from training.hardware import local_processes


def open_dataset(config: Config, *, learning: bool) -> DatasetIndex:
    """The data set, packed first if it is the embedded one; DATA and CONFIG where it cannot be used.

    Without `learning`, only the split to evaluate need be there.
    """
    location = config.data.location
    if config.data.root == EMBEDDED_DIGITS:
        from data_pipeline.digits import ensure_digits  # packing is needed once in the life of a data set

        ensure_digits(Path(location))
    dataset = load_dataset(location, **_cache(config)).dataset
    if dataset.task != config.task:
        raise UserError(
            f"task: {config.task!r}, but '{location}' was packed for {dataset.task!r}",
            mend=f"set --task {dataset.task}, or give another --data.root",
            code="CONFIG",
        )
    if config.data.val_split is not None:
        dataset.split(config.data.val_split)
    elif not learning:
        raise UserError(
            "data.val_split: none, there is nothing to evaluate on",
            mend=f"name a split: --data.val-split {' or '.join(dataset.splits)}",
            code="CONFIG",
        )
    if learning:
        _check_training_split(config, dataset)
    return dataset


def _check_training_split(config: Config, dataset: DatasetIndex) -> None:
    training = dataset.split(config.data.train_split)
    if training.samples < config.train.global_batch:
        raise UserError(
            f"train.global_batch: {config.train.global_batch} is more than the {training.samples} samples of "
            f"split {config.data.train_split!r}",
            mend=f"set --train.global-batch to {training.samples} or less",
            code="CONFIG",
        )
    if dataset.task == "segmentation" and config.data.mixup:
        raise UserError(
            f"data.mixup: {config.data.mixup}, but two masks cannot be blended",
            mend="use --data.cutmix, which pastes picture and mask, or set --data.mixup 0",
            code="CONFIG",
        )


def open_data_store(config: Config, dataset: DatasetIndex) -> Store:
    """Where the tars of the data set come from."""
    return open_store(config.data.location, tars=dataset.tars, **_cache(config))


def _cache(config: Config) -> dict[str, Any]:
    data = config.data
    return {"cache": Path(data.cache) if data.cache else None, "cache_bytes": int(data.cache_gib * 2**30)}


def make_plan(config: Config, dataset: DatasetIndex) -> Plan:
    """The order of samples: from the data set, the seed, the global batch and the balance alone."""
    return Plan(
        dataset.split(config.data.train_split).shard_samples,
        seed=config.seed,
        global_batch=config.train.global_batch,
        lanes=config.lanes,
        shuffle_block=config.data.shuffle_block,
        balance=_balance(config, dataset) if config.data.balance else None,
    )


def _balance(config: Config, dataset: DatasetIndex) -> Balance:
    """What a balanced plan must know of the labels: counted once, read again a shard at a time."""
    store = open_data_store(config, dataset)
    shards = dataset.split(config.data.train_split).shards

    def labels_of(position: int) -> Any:
        return read_shard_index(store.index_path(shards[position]), shards[position]).labels

    table = class_table(map(labels_of, range(len(shards))), len(dataset.classes))
    return Balance(config.data.balance, table, labels_of)


def batches(
    config: Config,
    dataset: DatasetIndex,
    accelerator: Accelerator,
    work: Callable[[], Iterator[Work]],
    *,
    learning: bool,
) -> Generator[Batch, None, None]:
    """The micro-batches that `work` asks for, in order, read ahead by workers.

    Of the training split if they are to learn from, else of the validation split; only to learn from are
    samples mixed, or left out.
    """
    data = config.data
    transforms = data.train_transforms if learning else data.eval_transforms
    split = data.train_split if learning else data.val_split
    assert split is not None
    recipe = Recipe(
        store=open_data_store(config, dataset),
        dataset=dataset,
        split=split,
        transforms=tuple(step.call for step in transforms),
        seed=config.seed,
        pinned=accelerator.device.type == "cuda",
        mixup=data.mixup if learning else 0.0,
        cutmix=data.cutmix if learning else 0.0,
        skip_bad=learning,
        sharers=local_processes(),
    )
    return stream(recipe, work, workers=data.workers, prefetch=data.prefetch, kind=data.worker_kind)


def training_batches(
    config: Config, dataset: DatasetIndex, plan: Plan, accelerator: Accelerator, *, steps: range
) -> Generator[Batch, None, None]:
    """This process's micro-batches of the given optimizer steps."""
    share = -(-config.train.global_batch // accelerator.num_processes)
    micro_batch = config.grain if config.train.exact else config.train.micro_batch or share

    def work() -> Iterator[Work]:
        return training_work(
            plan,
            steps=steps,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            micro_batch=micro_batch,
            mixing=bool(config.data.mixup or config.data.cutmix),
        )

    return batches(config, dataset, accelerator, work, learning=True)
