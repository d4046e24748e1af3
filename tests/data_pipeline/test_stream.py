import gc
import json
import shutil
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from data_pipeline.fault import UserError
from data_pipeline.index import index_path, index_tar, read_dataset, read_shard_index, write_shard_index
from data_pipeline.plan import Plan, Work, evaluation_work, training_work
from data_pipeline.stream import Recipe, stream
from data_pipeline.targets import target_reader

AUGMENTED = (
    ("random_resized_crop", {"size": 24, "scale": (0.3, 1.0)}),
    ("horizontal_flip", {}),
    ("random_shift", {"fraction": 0.1}),
)


def recipe_for(root, *, split="train", transforms=AUGMENTED, seed=0):
    return Recipe(root, read_dataset(root), split, transforms, seed, pinned=False)


def plan_for(root):
    sizes = read_dataset(root).split("train").shard_samples
    return Plan(sizes, seed=0, global_batch=12, lanes=4, shuffle_block=8)


def training(root, *, steps=range(9), process=0, processes=1, micro_batch=5):
    return partial(
        training_work,
        plan_for(root),
        steps=steps,
        process=process,
        processes=processes,
        micro_batch=micro_batch,
    )


def contents(batches):
    return [
        (batch.work.step, batch.work.piece, batch.keys, batch.images.tolist(), batch.targets.tolist())
        for batch in batches
    ]


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader-")]


@pytest.fixture
def copied(photo_dataset, tmp_path):
    return shutil.copytree(photo_dataset, tmp_path / "copied")


def damage_sample(root, number, extension, data):
    """Put other bytes of the same length into one member, with an index that finds them right."""
    split = read_dataset(root).split("train")
    position = int(np.searchsorted(np.cumsum(split.shard_samples), number, side="right"))
    tar = root / split.shards[position].name
    index = read_shard_index(index_path(tar), split.shards[position])
    row, column = number - 10 * position, index.extensions.index(extension)
    start, size = int(index.offset[row, column]), int(index.size[row, column])
    content = bytearray(tar.read_bytes())
    content[start : start + size] = data.ljust(size, b" ")[:size]
    tar.write_bytes(content)
    write_shard_index(index_path(tar), index_tar(tar))
    return tar.name, index.keys[row], index.offset[row]


def test_the_batches_are_those_of_the_plan(photo_dataset):
    batches = list(stream(recipe_for(photo_dataset), training(photo_dataset), workers=0, prefetch=2))
    assert [len(batch.keys) for batch in batches] == [4, 4, 4] * 9
    assert [batch.last for batch in batches] == [False, False, True] * 9
    plan = plan_for(photo_dataset)
    for step in range(9):
        numbers = np.concatenate([batch.work.numbers for batch in batches if batch.work.step == step])
        assert numbers.tolist() == plan.batch(step).tolist()
    first = batches[0]
    assert (first.images.dtype, first.images.shape) == (torch.uint8, (4, 24, 24, 3))
    assert (first.targets.dtype, first.valid.tolist()) == (torch.int64, [True] * 4)
    classes = read_dataset(photo_dataset).classes
    assert [classes[target] for target in first.targets] == [key.split("/")[0] for key in first.keys]


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_the_batches_do_not_depend_on_the_workers(photo_dataset, workers, prefetch):
    recipe, work = recipe_for(photo_dataset), training(photo_dataset)
    expected = contents(stream(recipe, work, workers=0, prefetch=1))
    assert contents(stream(recipe, work, workers=workers, prefetch=prefetch)) == expected


@pytest.mark.parametrize(("processes", "micro_batch"), [(2, 6), (3, 2), (5, 4)])
def test_a_sample_has_the_same_pixels_whoever_reads_it(photo_dataset, processes, micro_batch):
    def read(**topology):
        batches = stream(
            recipe_for(photo_dataset), training(photo_dataset, **topology), workers=2, prefetch=2
        )
        return {
            (batch.work.epoch, batch.work.step, key): pixels.tolist()
            for batch in batches
            for key, pixels in zip(batch.keys, batch.images, strict=True)
        }

    together = {}
    for process in range(processes):
        together |= read(process=process, processes=processes, micro_batch=micro_batch)
    assert together == read()


def test_a_sample_looks_different_in_another_epoch_and_under_another_seed(photo_dataset):
    def pixels(epoch, seed):
        work = [Work(epoch, 0, 0, 1, np.array([7]), valid=True)]
        (batch,) = stream(recipe_for(photo_dataset, seed=seed), partial(iter, work), workers=0, prefetch=1)
        return batch.images.numpy().tobytes()

    assert len({pixels(epoch, seed) for epoch in (0, 1) for seed in (0, 1)}) == 4


def test_a_sample_is_drawn_for_by_its_number_and_not_by_its_step_or_neighbours(photo_dataset):
    def pixels(step, numbers):
        work = [Work(0, step, 0, 1, np.array(numbers), valid=True)]
        (batch,) = stream(recipe_for(photo_dataset), partial(iter, work), workers=0, prefetch=1)
        return batch.images.numpy()

    assert np.array_equal(pixels(0, [7, 8, 9])[1], pixels(5, [30, 8])[1])


def test_an_evaluation_streams_every_sample_once(photo_dataset):
    recipe = recipe_for(photo_dataset, split="val", transforms=(("center_crop", {"size": 16}),))
    keys = []
    for process in range(3):
        work = partial(evaluation_work, 12, batch=5, process=process, processes=3)
        keys += [key for batch in stream(recipe, work, workers=2, prefetch=1) for key in batch.keys]
    assert len(keys) == len(set(keys)) == 12


def test_a_stand_in_is_marked_as_not_valid(photo_dataset):
    work = training(photo_dataset, steps=range(1), process=13, processes=14)
    (batch,) = stream(recipe_for(photo_dataset), work, workers=1, prefetch=1)
    assert batch.valid.tolist() == [False, False]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_picture_that_cannot_be_decoded_stops_the_run_at_its_batch_and_names_its_place(copied, workers):
    work = training(copied)
    number = int(plan_for(copied).batch(2)[0])
    shard, key, offsets = damage_sample(copied, number, picture_of(copied, number), b"<html>")
    batches = stream(recipe_for(copied), work, workers=workers, prefetch=2)
    before = [next(batches).work for _ in range(6)]
    with pytest.raises(UserError, match="cannot decode") as caught:
        next(batches)
    assert [(one.step, one.piece) for one in before] == [
        (step, piece) for step in range(2) for piece in range(3)
    ]
    assert caught.value.place == {"shard": shard, "member": key, "offset": min(filter(None, offsets))}
    assert not reader_threads()


def picture_of(root, number):
    split = read_dataset(root).split("train")
    index = read_shard_index(index_path(root / split.shards[number // 10].name), split.shards[number // 10])
    column = index.extensions.index("jpg")
    return "jpg" if index.offset[number % 10, column] else "png"


@pytest.mark.parametrize("workers", [0, 3])
def test_a_label_out_of_range_is_an_error_in_the_data(copied, workers):
    shard, key, _ = damage_sample(copied, 0, "cls", b"7")
    with pytest.raises(UserError, match=r"the label b'7', allowed are 0 to 2") as caught:
        list(stream(recipe_for(copied), training(copied), workers=workers, prefetch=1))
    assert caught.value.code == "DATA"
    assert (caught.value.place["shard"], caught.value.place["member"]) == (shard, f"{key}.cls")


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_of_different_sizes_are_an_error_in_the_configuration(photo_dataset, workers):
    recipe = recipe_for(photo_dataset, transforms=(("horizontal_flip", {}),))
    with pytest.raises(UserError, match="pictures of different sizes in one batch") as caught:
        list(stream(recipe, training(photo_dataset), workers=workers, prefetch=1))
    assert caught.value.code == "CONFIG"
    assert "random_resized_crop" in caught.value.mend


@pytest.mark.parametrize("taken", [0, 1, 4])
@pytest.mark.parametrize("workers", [1, 3])
def test_closing_the_stream_early_ends_every_thread(photo_dataset, workers, taken):
    endless = training(photo_dataset, steps=range(10**6))
    batches = stream(recipe_for(photo_dataset), endless, workers=workers, prefetch=1)
    for _ in range(taken):
        next(batches)
    assert len(reader_threads()) == (workers if taken else 0)
    batches.close()
    assert not reader_threads()


def test_a_stream_that_is_forgotten_ends_its_threads(photo_dataset):
    batches = stream(recipe_for(photo_dataset), training(photo_dataset), workers=2, prefetch=1)
    next(batches)
    del batches
    gc.collect()
    assert not reader_threads()


def test_reading_ahead_stops_at_the_prefetch(photo_dataset):
    asked = []

    def work():
        for one in training(photo_dataset, steps=range(10**6))():
            asked.append(one)
            yield one

    batches = stream(recipe_for(photo_dataset), work, workers=2, prefetch=2)
    for _ in range(4):
        next(batches)
    threading.Event().wait(0.5)
    batches.close()
    # Both workers walk the whole plan: 4 taken, 2 x 2 waiting, 2 in hand, and what each left to the other.
    assert len(asked) <= 2 * (4 + 4 + 2 + 2)


def test_an_unknown_split_is_an_error_that_lists_the_others(photo_dataset):
    recipe = replace(recipe_for(photo_dataset), split="test")
    with pytest.raises(UserError, match="no split 'test'"):
        list(stream(recipe, training(photo_dataset), workers=2, prefetch=1))


def test_grey_data_sets_stream_one_channel(photo_dataset, copied):
    raw = json.loads((copied / "dataset.json").read_text())
    raw.update(image_mode="L", mean=[0.5], std=[0.2])
    (copied / "dataset.json").write_text(json.dumps(raw))
    batch = next(stream(recipe_for(copied), training(copied), workers=0, prefetch=1))
    assert batch.images.shape == (4, 24, 24, 1)


def test_a_task_of_a_later_version_is_refused_by_name():
    with pytest.raises(UserError, match="'depth', this version knows multiclass"):
        target_reader("depth")
