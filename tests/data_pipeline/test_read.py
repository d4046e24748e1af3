import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import read
from data_pipeline.fault import UserError
from data_pipeline.index import index_path, read_dataset
from data_pipeline.read import ShardReader
from data_pipeline.shard_index import read_shard_index
from data_pipeline.store import Folder


def reader_of(root, split="train", **options):
    return ShardReader(Folder(root), read_dataset(root), split, **options)


def read_all(root, split):
    reader = reader_of(root, split)
    samples = reader.read_many(np.arange(read_dataset(root).split(split).samples))
    reader.close()
    return samples


def open_tars():
    return sum(link.resolve().suffix == ".tar" for link in Path("/proc/self/fd").iterdir())


@pytest.fixture
def damaged(photo_dataset, tmp_path):
    """A copy in which one bit of the third picture of the second shard is another; its key and offset."""
    root = shutil.copytree(photo_dataset, tmp_path / "damaged")
    shard = read_dataset(root).split("train").shards[1]
    index = read_shard_index(index_path(root / shard.name), shard)
    column = index.column(("jpg", "png"), 2)
    offset = int(index.offset[2, column])
    data = bytearray((root / shard.name).read_bytes())
    data[offset + 100] ^= 1
    (root / shard.name).write_bytes(data)
    return root, {"shard": shard.name, "member": index.key(2), "offset": offset}


def test_every_sample_is_read_with_its_number_key_and_place(photo_dataset):
    samples = read_all(photo_dataset, "train")
    assert [sample.number for sample in samples] == list(range(48))
    assert len({sample.key for sample in samples}) == 48
    classes = read_dataset(photo_dataset).classes
    for sample in samples:
        with tarfile.open(photo_dataset / sample.shard) as tar:
            (member,) = [one for one in tar if one.offset_data == sample.offset]
            assert member.name.startswith(f"{sample.key}.")
            assert tar.extractfile(member).read() == sample.image
        assert sample.key.split("/")[0] == classes[sample.label]


@given(numbers=st.lists(st.integers(0, 47), min_size=1, max_size=60))
@settings(max_examples=30, deadline=None)
def test_samples_come_in_the_order_they_are_asked_for_whatever_it_is(photo_dataset, numbers):
    reader = reader_of(photo_dataset)
    together = reader.read_many(np.array(numbers))
    assert together == [reader.read(number) for number in numbers]
    reader.close()


def test_neighbours_are_read_in_one_go(photo_dataset, monkeypatch):
    calls = []
    pread = os.pread
    monkeypatch.setattr(read.os, "pread", lambda *words: calls.append(words) or pread(*words))
    reader = reader_of(photo_dataset)
    reader.read_many(np.arange(10))
    assert len(calls) == 1
    reader.read_many(np.array([10, 39]))
    assert len(calls) == 3
    reader.close()


def test_a_sample_with_labels_has_them_and_one_with_a_mask_has_its_bytes(
    multilabel_dataset, segmentation_dataset
):
    labels = np.stack([sample.label for sample in read_all(multilabel_dataset, "train")])
    assert labels.dtype == np.int8
    assert set(np.unique(labels)) == {-1, 0, 1}
    for sample in read_all(segmentation_dataset, "train"):
        assert sample.label is None
        assert sample.mask[:4] == b"\x89PNG"


def test_one_bit_of_damage_is_found_and_its_place_named(damaged):
    root, place = damaged
    faults = [sample.fault for sample in read_all(root, "train") if sample.fault]
    (fault,) = faults
    assert fault.place == place
    assert fault.code == "DATA"
    assert f"'{place['shard']}': sample '{place['member']}' is not the" in fault.what


def test_the_other_samples_of_a_damaged_shard_are_read(damaged):
    root, _ = damaged
    samples = read_all(root, "train")
    assert [sample.number for sample in samples if sample.fault] == [12]
    assert all(sample.image for sample in samples if not sample.fault)


def test_few_shards_stay_open_and_none_after_closing(photo_dataset):
    before = open_tars()
    reader = reader_of(photo_dataset, open_shards=2)
    keys = [reader.read(number).key for number in (0, 10, 20, 30, 0, 40)]
    assert keys[0] == keys[4]
    assert open_tars() == before + 2
    reader.close()
    assert open_tars() == before


@pytest.mark.parametrize("damage", ["gone", "shorter", "index gone", "index damaged"])
def test_a_shard_that_is_not_whole_is_an_error_that_leaves_nothing_open(photo_dataset, tmp_path, damage):
    root = shutil.copytree(photo_dataset, tmp_path / "copy")
    shard = read_dataset(root).split("train").shards[0]
    tar, index = root / shard.name, index_path(root / shard.name)
    {
        "gone": tar.unlink,
        "shorter": lambda: os.truncate(tar, shard.bytes - 512),
        "index gone": index.unlink,
        "index damaged": lambda: index.write_bytes(index.read_bytes()[:-1] + b"\xff"),
    }[damage]()
    reader = reader_of(root)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(UserError, match=shard.name[:-4]) as caught:
            reader.read(0)
        assert (caught.value.code, caught.value.place["shard"]) == ("DATA", shard.name)
        del caught  # its traceback holds on to what the reader had open
    assert len(list(Path("/proc/self/fd").iterdir())) == before
