import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline import reader_processes
from data_pipeline.fault import UserError
from data_pipeline.index import index_path, read_dataset
from data_pipeline.plan import Plan, Work, evaluation_work, training_work
from data_pipeline.produce import Recipe
from data_pipeline.shard_index import read_shard_index
from data_pipeline.store import Folder
from data_pipeline.stream import stream

ROOT = Path(__file__).parent.parent.parent
AUGMENTED = (
    ("random_resized_crop", {"size": 24, "scale": (0.3, 1.0)}),
    ("horizontal_flip", {}),
    ("random_shift", {"fraction": 0.1}),
)
ALONE = {"workers": 0, "prefetch": 1}
KINDS = ("threads", "processes")
READERS = [{"workers": 0, "kind": "threads"}, *({"workers": 2, "kind": kind} for kind in KINDS)]


def recipe_for(root, *, split="train", transforms=AUGMENTED, seed=0, **options):
    return Recipe(Folder(root), read_dataset(root), split, transforms, seed, **options)


def plan_for(root):
    sizes = read_dataset(root).split("train").shard_samples
    return Plan(sizes, seed=0, global_batch=12, lanes=4, shuffle_block=8)


def training(root, *, steps=range(9), process=0, processes=1, micro_batch=5, mixing=False):
    return partial(
        training_work,
        plan_for(root),
        steps=steps,
        process=process,
        processes=processes,
        micro_batch=micro_batch,
        mixing=mixing,
    )


def contents(batches):
    """Everything in the batches, copied: the next one is made in the same memory."""
    return [
        (batch.work.step, batch.work.piece, batch.keys, batch.images.tolist(), batch.targets.tolist())
        for batch in batches
    ]


def readers():
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("reader")]
    return threads + multiprocessing.active_children()


@pytest.fixture
def copied(photo_dataset, tmp_path):
    return shutil.copytree(photo_dataset, tmp_path / "copied")


def damage(root, number):
    """Flip a bit in the picture of a training sample; its shard, key and offset."""
    split = read_dataset(root).split("train")
    shard = split.shards[number // 10]
    index = read_shard_index(index_path(root / shard.name), shard)
    row = number % 10
    offset = int(index.offset[row, index.column(("jpg", "png"), row)])
    content = bytearray((root / shard.name).read_bytes())
    content[offset + 50] ^= 1
    (root / shard.name).write_bytes(content)
    return {"shard": shard.name, "member": index.key(row), "offset": offset}


def key_of(root, number):
    shard = read_dataset(root).split("train").shards[number // 10]
    return read_shard_index(index_path(root / shard.name), shard).key(number % 10)


def test_the_batches_are_those_of_the_plan(photo_dataset):
    plan, classes = plan_for(photo_dataset), read_dataset(photo_dataset).classes
    steps = {step: [] for step in range(9)}
    for batch in stream(recipe_for(photo_dataset), training(photo_dataset), workers=0, prefetch=2):
        steps[batch.work.step].append(batch.work.numbers)
        assert (len(batch.keys), batch.last) == (4, batch.work.piece == 2)
        assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (4, 24, 24, 3))
        assert (batch.targets.dtype, batch.valid.tolist()) == (torch.int64, [True] * 4)
        assert [classes[target] for target in batch.targets] == [key.split("/")[0] for key in batch.keys]
    for step, numbers in steps.items():
        assert np.concatenate(numbers).tolist() == plan.batch(step).tolist()


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_the_batches_do_not_depend_on_the_workers(photo_dataset, kind, workers, prefetch):
    recipe, work = recipe_for(photo_dataset), training(photo_dataset)
    expected = contents(stream(recipe, work, **ALONE))
    assert contents(stream(recipe, work, workers=workers, prefetch=prefetch, kind=kind)) == expected


@pytest.mark.parametrize(("processes", "micro_batch"), [(2, 6), (3, 2), (5, 4)])
def test_a_sample_has_the_same_pixels_whoever_reads_it(photo_dataset, processes, micro_batch):
    def seen(**topology):
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
        together |= seen(process=process, processes=processes, micro_batch=micro_batch)
    assert together == seen()


def pixels_of(recipe, *works, **readers):
    batches = stream(recipe, partial(iter, works), **(ALONE | readers))
    return [batch.images.numpy().copy() for batch in batches]


def test_a_sample_looks_different_in_another_epoch_under_another_seed_and_as_another_copy(photo_dataset):
    def pixels(epoch, seed, copy):
        work = Work(epoch, 0, 0, 1, np.array([7]), valid=True, copies=np.array([copy]))
        return pixels_of(recipe_for(photo_dataset, seed=seed), work)[0].tobytes()

    assert len({pixels(epoch, seed, copy) for epoch in (0, 1) for seed in (0, 1) for copy in (0, 1)}) == 8


def test_a_sample_is_drawn_for_by_its_number_and_not_by_its_step_or_neighbours(photo_dataset):
    def pixels(step, numbers):
        return pixels_of(recipe_for(photo_dataset), Work(0, step, 0, 1, np.array(numbers), valid=True))[0]

    assert np.array_equal(pixels(0, [7, 8, 9])[1], pixels(5, [30, 8])[1])


def test_a_batch_is_made_in_memory_that_is_used_again(photo_dataset):
    for kind in KINDS:
        batches = stream(recipe_for(photo_dataset), training(photo_dataset), workers=2, prefetch=2, kind=kind)
        addresses = [batch.images.data_ptr() for batch in batches]
        assert len(addresses) == 27
        assert len(set(addresses)) <= 2 * 2 + 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_larger_than_the_first_is_made_in_memory_of_its_own(photo_dataset, kind):
    works = [Work(0, step, 0, 1, np.arange(step * 3 + 1), valid=True) for step in range(4)]
    recipe = recipe_for(photo_dataset)
    expected = pixels_of(recipe, *works)
    found = pixels_of(recipe, *works, workers=2, kind=kind)
    assert [len(one) for one in found] == [1, 4, 7, 10]
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_an_evaluation_streams_every_sample_once(photo_dataset):
    recipe = recipe_for(photo_dataset, split="val", transforms=(("center_crop", {"size": 16}),))
    keys = []
    for process in range(3):
        work = partial(evaluation_work, 12, batch=5, process=process, processes=3)
        keys += [key for batch in stream(recipe, work, workers=2, prefetch=1) for key in batch.keys]
    assert len(keys) == len(set(keys)) == 12


def test_a_process_that_has_nothing_to_do_streams_nothing(photo_dataset):
    assert list(stream(recipe_for(photo_dataset), partial(iter, []), workers=2, prefetch=1)) == []


def test_a_stand_in_is_marked_as_not_valid(photo_dataset):
    work = training(photo_dataset, steps=range(1), process=13, processes=14)
    (batch,) = stream(recipe_for(photo_dataset), work, workers=1, prefetch=1)
    assert batch.valid.tolist() == [False, False]


@pytest.mark.parametrize("readers_", READERS)
def test_labels_and_masks_arrive_as_what_they_are(multilabel_dataset, segmentation_dataset, readers_):
    transforms = (("random_resized_crop", {"size": 16}),)
    work = [Work(0, 0, 0, 1, np.arange(4), valid=True)]
    for root, kind, shape in (
        (multilabel_dataset, torch.int8, (4, len(read_dataset(multilabel_dataset).classes))),
        (segmentation_dataset, torch.uint8, (4, 16, 16)),
    ):
        recipe = recipe_for(root, transforms=transforms)
        (found,) = [
            (batch.targets.dtype, batch.targets.shape, batch.targets.unique().tolist(), batch.mixed)
            for batch in stream(recipe, partial(iter, work), prefetch=1, **readers_)
        ]
        assert found[:2] == (kind, shape)
        assert set(found[2]) <= {-1, 0, 1, 255}
        assert found[3] is None


@pytest.mark.parametrize("readers_", READERS)
def test_a_broken_sample_is_replaced_by_its_neighbour_and_told_of(copied, photo_dataset, readers_):
    number = int(plan_for(copied).batch(2)[0])
    place = damage(copied, number)
    plain = {"transforms": (("resized_center_crop", {"size": 24, "shorter": 24}),)}
    whole = contents(stream(recipe_for(photo_dataset, **plain), training(copied), prefetch=2, **readers_))
    bad, found = [], []
    for batch in stream(recipe_for(copied, **plain), training(copied), prefetch=2, **readers_):
        found += contents([batch])
        bad += [(batch.work.step, one) for one in batch.bad]
    other = key_of(copied, (number + 1) % 48)
    assert bad[0][0] == 2
    for _, one in bad:
        assert {"shard": one.shard, "member": one.key, "offset": one.offset} == place
        assert "bytes that were packed" in one.exception
        assert one.replaced_by == other
    differing = [
        (key, instead)
        for before, after in zip(whole, found, strict=True)
        for key, instead in zip(before[2], after[2], strict=True)
        if key != instead
    ]
    assert differing == [(place["member"], other)] * len(bad)


def test_neighbours_that_are_broken_too_are_passed_over(copied):
    number = int(plan_for(copied).batch(2)[0])
    for distance in range(3):
        damage(copied, (number + distance) % 48)
    bad = [
        one
        for batch in stream(recipe_for(copied), training(copied, steps=range(2, 3)), **ALONE)
        for one in batch.bad
    ]
    assert key_of(copied, number) in {one.key for one in bad}
    assert key_of(copied, (number + 3) % 48) in {one.replaced_by for one in bad}


@pytest.mark.parametrize("readers_", READERS)
def test_a_broken_sample_that_may_not_be_left_out_ends_the_stream_at_its_batch(copied, readers_):
    place = damage(copied, int(plan_for(copied).batch(2)[0]))
    recipe = recipe_for(copied, skip_bad=False)
    batches = stream(recipe, training(copied), prefetch=2, **readers_)
    before = [next(batches).work for _ in range(6)]
    with pytest.raises(UserError, match=r"is not the .* bytes that were packed") as caught:
        next(batches)
    assert [(one.step, one.piece) for one in before] == [
        (step, piece) for step in range(2) for piece in range(3)
    ]
    assert caught.value.place == place
    assert not readers()


@pytest.mark.parametrize("readers_", READERS)
def test_pictures_of_different_sizes_are_an_error_in_the_configuration(photo_dataset, readers_):
    recipe = recipe_for(photo_dataset, transforms=(("horizontal_flip", {}),))
    with pytest.raises(UserError, match="pictures of different sizes in one batch") as caught:
        list(stream(recipe, training(photo_dataset), prefetch=1, **readers_))
    assert caught.value.code == "CONFIG"
    assert "random_resized_crop" in caught.value.mend


def test_what_no_user_can_mend_arrives_with_the_traceback_of_the_process_it_happened_in(photo_dataset):
    recipe = recipe_for(photo_dataset, transforms=(*AUGMENTED, ("random_shift", {"speed": 1})))
    with pytest.raises(TypeError, match="speed"):
        list(stream(recipe, training(photo_dataset), workers=2, prefetch=1, kind="threads"))
    late = Work(0, 0, 0, 1, np.array([10**9]), valid=True)
    works = [Work(0, 0, 0, 1, np.arange(2), valid=True), late]
    with pytest.raises(RuntimeError, match=r"(?s)a reader process failed.*Traceback.*IndexError"):
        list(stream(recipe_for(photo_dataset), partial(iter, works), workers=1, prefetch=1, kind="processes"))


@pytest.mark.parametrize("taken", [0, 1, 4])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_closing_the_stream_early_ends_every_reader(photo_dataset, kind, workers, taken):
    endless = training(photo_dataset, steps=range(10**6))
    batches = stream(recipe_for(photo_dataset), endless, workers=workers, prefetch=1, kind=kind)
    for _ in range(taken):
        next(batches)
    if kind == "processes":
        assert len(readers()) == (workers if taken else 0)
    batches.close()
    assert not readers()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_is_forgotten_ends_its_readers(photo_dataset, kind):
    batches = stream(recipe_for(photo_dataset), training(photo_dataset), workers=2, prefetch=1, kind=kind)
    next(batches)
    del batches
    gc.collect()
    assert not readers()


@pytest.mark.parametrize("kind", KINDS)
def test_reading_ahead_stops_at_the_prefetch(photo_dataset, kind):
    asked = []

    def work():
        for one in training(photo_dataset, steps=range(10**6))():
            asked.append(one)
            yield one

    batches = stream(recipe_for(photo_dataset), work, workers=2, prefetch=2, kind=kind)
    for _ in range(4):
        next(batches)
    time.sleep(0.3)
    batches.close()
    assert len(asked) <= 4 + 2 * 2


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_reader_process_that_is_killed_is_replaced_and_nothing_is_lost(photo_dataset, deaths):
    recipe, work = recipe_for(photo_dataset), training(photo_dataset, steps=range(40))
    expected = contents(stream(recipe, work, **ALONE))
    found = []
    for number, batch in enumerate(stream(recipe, work, workers=2, prefetch=2, kind="processes")):
        found += contents([batch])
        if number in (20, 60)[:deaths]:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    assert found == expected
    assert not readers()


def test_readers_that_die_again_and_again_end_the_stream(photo_dataset, monkeypatch):
    monkeypatch.setattr(reader_processes, "_begin", lambda _worker: os._exit(9))
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(
            stream(
                recipe_for(photo_dataset), training(photo_dataset), workers=1, prefetch=1, kind="processes"
            )
        )
    assert not readers()


def test_a_death_of_a_reader_disturbs_nobody_but_the_stream(photo_dataset):
    """torch's own handler of SIGCHLD would raise in the middle of whatever the main thread does."""
    before = signal.getsignal(signal.SIGCHLD)
    batches = stream(
        recipe_for(photo_dataset), training(photo_dataset), workers=1, prefetch=1, kind="processes"
    )
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == before
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(0.2)
    batches.close()


def test_reader_processes_do_not_draw_from_torchs_generator(photo_dataset):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    list(stream(recipe_for(photo_dataset), training(photo_dataset), workers=1, prefetch=1, kind="processes"))
    assert torch.rand(1) == expected


STREAMING = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
sys.path.insert(0, sys.argv[3])
from pathlib import Path
import multiprocessing
from test_stream import recipe_for, training
from data_pipeline.stream import stream
root = Path(sys.argv[1])
endless = training(root, steps=range(10**6))
batches = stream(recipe_for(root), endless, workers=2, prefetch=1, kind="processes")
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""


def test_readers_end_with_their_parent_however_it_ends(photo_dataset):
    words = [sys.executable, "-c", STREAMING, str(photo_dataset), str(ROOT), str(Path(__file__).parent)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        children = [int(word) for word in parent.stdout.readline().split()]
        assert len(children) == 2
        parent.kill()
    until = time.monotonic() + 5
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < until, "a reader outlived its parent"
        time.sleep(0.05)


def test_signals_to_stop_are_the_parents_business(photo_dataset):
    batches = stream(
        recipe_for(photo_dataset), training(photo_dataset), workers=2, prefetch=1, kind="processes"
    )
    found = contents([next(batches)])
    for child in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(child.pid, number)
    found += contents(batches)
    assert found == contents(stream(recipe_for(photo_dataset), training(photo_dataset), **ALONE))


def test_nothing_of_the_slots_lies_in_shared_memory_that_could_be_left_behind(photo_dataset):
    before = set(os.listdir("/dev/shm"))  # noqa: PTH208, S108 - the kernel's, and names are enough
    batches = stream(
        recipe_for(photo_dataset), training(photo_dataset), workers=2, prefetch=1, kind="processes"
    )
    next(batches)
    assert {name for name in set(os.listdir("/dev/shm")) - before if "torch" in name} == set()  # noqa: PTH208, S108
    batches.close()


def test_an_unknown_split_is_an_error_that_lists_the_others(photo_dataset):
    recipe = replace(recipe_for(photo_dataset), split="test")
    with pytest.raises(UserError, match="no split 'test'"):
        list(stream(recipe, training(photo_dataset), workers=2, prefetch=1))


def test_grey_data_sets_stream_one_channel(copied):
    raw = json.loads((copied / "dataset.json").read_text())
    raw.update(image_mode="L", mean=[0.5], std=[0.2])
    (copied / "dataset.json").write_text(json.dumps(raw))
    batch = next(stream(recipe_for(copied), training(copied), workers=0, prefetch=1))
    assert batch.images.shape == (4, 24, 24, 1)


def mixed_steps(root, **topology):
    """What each step sees of every sample, with what it is mixed with, over all processes."""
    processes = topology.pop("processes", 1)
    micro_batch = topology.pop("micro_batch", 12)
    steps = {}
    recipe = recipe_for(root, mixup=0.4, cutmix=1.0)
    for process in range(processes):
        work = training(
            root,
            steps=range(6),
            process=process,
            processes=processes,
            micro_batch=micro_batch,
            mixing=True,
        )
        for batch in stream(recipe, work, prefetch=2, **topology):
            rows = zip(batch.keys, batch.images.tolist(), batch.mixed.targets, batch.mixed.share, strict=True)
            for key, pixels, target, share in rows:
                steps[batch.work.step, key] = (pixels, int(target), float(share))
    return steps


@pytest.mark.parametrize(
    "topology",
    [
        {"processes": 1, "micro_batch": 5, "workers": 2, "kind": "threads"},
        {"processes": 3, "micro_batch": 3, "workers": 0},
        {"processes": 5, "micro_batch": 2, "workers": 0},
        {"processes": 2, "micro_batch": 1, "workers": 1, "kind": "processes"},
    ],
)
def test_a_partner_is_the_same_one_with_the_same_pixels_wherever_the_batch_is_cut(photo_dataset, topology):
    expected = mixed_steps(photo_dataset, workers=0)
    assert len(expected) == 72
    assert len({share for _, _, share in expected.values()}) > 20
    assert mixed_steps(photo_dataset, **topology) == expected


@pytest.mark.parametrize(
    "transforms",
    [
        (("random_resized_crop", {"size": 24}),),
        (("random_resized_crop", {"size": 24}), ("quarter_turn", {}), ("vertical_flip", {})),
        (
            ("random_resized_crop", {"size": 24}),
            ("random_shift", {"fraction": 0.3}),
            ("center_crop", {"size": 20}),
        ),
    ],
)
def test_samples_that_are_made_in_their_place_are_those_that_are_made_elsewhere(photo_dataset, transforms):
    """The first sample of a batch is always made elsewhere: in batches of one, all are."""
    recipe = recipe_for(photo_dataset, transforms=transforms)
    together = pixels_of(recipe, Work(0, 0, 0, 1, np.arange(48), valid=True))[0]
    alone = pixels_of(recipe, *(Work(0, 0, 0, 1, np.array([number]), valid=True) for number in range(48)))
    assert np.array_equal(together, np.concatenate(alone))
