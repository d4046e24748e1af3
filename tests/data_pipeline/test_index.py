import io
import json
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.disk import file_sha256
from data_pipeline.draws import hash64
from data_pipeline.fault import UserError
from data_pipeline.index import FORMAT, Shard, index_path, read_dataset, write_dataset
from data_pipeline.read import ShardReader
from data_pipeline.shard_index import make_shard_index, read_shard_index, write_shard_index
from data_pipeline.store import Folder
from data_pipeline.tars import tar_members


@pytest.fixture
def copied(photo_dataset, tmp_path):
    return shutil.copytree(photo_dataset, tmp_path / "copied")


def first_shard(root):
    shard = read_dataset(root).split("train").shards[0]
    return shard, root / shard.name


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def change_json(root, change):
    path = root / "dataset.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def read_first(root):
    reader = ShardReader(Folder(root), read_dataset(root), "train")
    try:
        return reader.read(0)
    finally:
        reader.close()


def described(tar, samples, index_sha256):
    """The entry in dataset.json of a tar and of the index that was written for it."""
    return Shard(tar.name, samples, tar.stat().st_size, file_sha256(tar), index_sha256)


def indexed(tar, labels):
    """The index of a tar, written beside it and read again."""
    index = make_shard_index(tar_members(tar), labels)
    digest = write_shard_index(index_path(tar), index)
    return index, read_shard_index(index_path(tar), described(tar, len(index), digest))


def test_an_index_says_where_tarfile_finds_every_member(photo_dataset):
    for split in read_dataset(photo_dataset).splits.values():
        for shard in split.shards:
            index = read_shard_index(index_path(photo_dataset / shard.name), shard)
            with tarfile.open(photo_dataset / shard.name) as tar:
                expected = {member.name: (member.offset_data, member.size) for member in tar}
            found = {
                f"{key}.{extension}": (int(index.offset[row, column]), int(index.size[row, column]))
                for row, key in enumerate(index.keys)
                for column, extension in enumerate(index.extensions)
                if index.offset[row, column]
            }
            assert found == expected


def test_a_dataset_comes_back_as_it_was_written(photo_dataset, tmp_path):
    dataset = read_dataset(photo_dataset)
    write_dataset(tmp_path, dataset)
    assert read_dataset(tmp_path) == dataset
    assert (tmp_path / "dataset.json").read_bytes() == (photo_dataset / "dataset.json").read_bytes()
    assert read_dataset(tmp_path).identity() == dataset.identity()


def test_another_class_name_or_shard_makes_another_identity(photo_dataset):
    dataset = read_dataset(photo_dataset)
    renamed = replace(dataset, classes=("astronaut", "cat", "tea"))
    shorter = {**dataset.splits, "train": replace(dataset.split("train"), shards=())}
    assert len({one.identity() for one in (dataset, renamed, replace(dataset, splits=shorter))}) == 3


def test_the_digest_of_a_split_is_the_sum_of_its_keys_hashes(photo_dataset):
    for split in read_dataset(photo_dataset).splits.values():
        indexes = [read_shard_index(index_path(photo_dataset / one.name), one) for one in split.shards]
        total = sum(hash64(key.encode()) for index in indexes for key in index.keys)
        assert split.keys_digest == f"{total % 2**64:016x}"


def test_members_that_a_sample_lacks_have_offset_zero(tmp_path):
    members = [("dir/ä.png", b"12"), ("dir/ä.cls", b"0"), ("b.cls", b"1"), ("b.x.json", b"{}")]
    write_tar(tmp_path / "a.tar", members)
    index, again = indexed(tmp_path / "a.tar", np.array([0, 1], np.int32))
    assert index.keys == again.keys == ["dir/ä", "b"]
    assert index.extensions == again.extensions == ["cls", "png", "x.json"]
    assert (again.offset > 0).tolist() == [[True, True, False], [True, False, True]]
    assert again.column(("png", "x.json"), 0) == 1
    assert again.column(("png", "x.json"), 1) == 2
    assert again.column(("png", "jpg"), 1) is None
    for name in ("offset", "size", "crc32", "labels", "key_ends", "key_bytes"):
        assert np.array_equal(getattr(index, name), getattr(again, name)), name


@pytest.mark.parametrize(
    "labels",
    [
        np.array([3, 0], np.int32),
        np.array([[1, 0, -1], [-1, -1, 1]], np.int8),
        np.zeros((2, 0), np.int8),
    ],
)
def test_labels_of_every_task_come_back(tmp_path, labels):
    write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2")])
    _, again = indexed(tmp_path / "a.tar", labels)
    assert again.labels.dtype == labels.dtype
    assert np.array_equal(again.labels, labels)


def test_an_index_of_a_tar_without_samples_comes_back(tmp_path):
    write_tar(tmp_path / "a.tar", [])
    _, again = indexed(tmp_path / "a.tar", np.zeros(0, np.int32))
    assert (len(again), again.keys, again.extensions) == (0, [], [])


def test_an_index_with_a_very_long_key_comes_back(tmp_path):
    key = "deep/" * 60 + "n" * 200
    write_tar(tmp_path / "a.tar", [(f"{key}.jpg", b"1"), (f"{key}.cls", b"0")])
    assert indexed(tmp_path / "a.tar", np.zeros(1, np.int32))[1].keys == [key]


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "noise", "another shard's"])
def test_a_damaged_index_is_an_error_that_names_it(copied, damage):
    shard, tar = first_shard(copied)
    path = index_path(tar)
    data = path.read_bytes()
    path.unlink()
    if damage == "another shard's":
        shutil.copy(index_path(copied / read_dataset(copied).split("val").shards[-1].name), path)
    elif damage != "missing":
        path.write_bytes({"empty": b"", "truncated": data[:-7], "noise": b"\x00\xff" * 300}[damage])
    with pytest.raises(UserError, match=r"train-000000\.idx") as caught:
        read_first(copied)
    assert caught.value.code == "DATA"
    assert caught.value.place == {"shard": shard.name}


def test_an_index_never_ends_in_anything_but_a_user_error(copied):
    """With a checksum that fits, as of somebody who writes indexes to do harm."""
    shard, tar = first_shard(copied)
    path = index_path(tar)
    whole = path.read_bytes()
    numbers = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        for place in numbers.integers(0, min(len(data), 700), 3):
            data[place] = numbers.integers(0, 256)
        path.write_bytes(data)
        try:
            index = read_shard_index(path, replace(shard, index_sha256=file_sha256(path)))
        except UserError:
            continue
        assert len(index) == shard.samples


def test_any_changed_byte_of_an_index_is_noticed(copied):
    shard, tar = first_shard(copied)
    path = index_path(tar)
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 100).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="its SHA-256 is not the one in"):
            read_shard_index(path, shard)


def test_an_index_that_points_behind_its_tar_is_refused(copied):
    shard, tar = first_shard(copied)
    index = read_shard_index(index_path(tar), shard)
    offset = index.offset.copy()
    offset[0, 0] = 2**64 - 1  # offset + size wraps around to 0
    digest = write_shard_index(index_path(tar), replace(index, offset=offset))
    with pytest.raises(UserError, match="behind the end"):
        read_shard_index(index_path(tar), replace(shard, index_sha256=digest))


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer"])
def test_a_damaged_shard_is_an_error_that_names_it(copied, damage):
    shard, tar = first_shard(copied)
    data = tar.read_bytes()
    tar.unlink()
    if damage != "missing":
        tar.write_bytes(data[:-512] if damage == "truncated" else data + b"\0")
    with pytest.raises(UserError, match=r"train-000000\.tar") as caught:
        read_first(copied)
    assert caught.value.place == {"shard": shard.name}


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/secret.tar", "a/b.tar", "..", "", "a.zip"])
def test_a_shard_that_leaves_its_folder_is_unsafe(copied, name):
    change_json(copied, lambda raw: raw["splits"]["train"]["shards"][0].update(name=name))
    with pytest.raises(UserError) as caught:
        read_dataset(copied)
    assert caught.value.code == "UNSAFE"
    assert repr(name) in caught.value.what


def test_another_format_is_refused_with_both_numbers(copied):
    change_json(copied, lambda raw: raw.update(format=7))
    with pytest.raises(UserError, match=f"has format 7, this version reads format {FORMAT}"):
        read_dataset(copied)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("splits"),
        lambda raw: raw.update(splits=[1]),
        lambda raw: raw.update(image_mode="CMYK"),
        lambda raw: raw.update(mean=[0.5]),
        lambda raw: raw["classes"].append("more"),
        lambda raw: raw["splits"]["train"]["shards"][0].pop("sha256"),
        lambda raw: raw["splits"]["train"]["shards"][0].update(samples="many"),
    ],
)
def test_a_damaged_dataset_json_is_an_error_that_names_it(copied, change):
    change_json(copied, change)
    with pytest.raises(UserError, match=r"cannot use .*dataset\.json"):
        read_dataset(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff\xfe", "[" * 100_000])
def test_a_dataset_json_that_is_no_such_json_is_an_error_that_names_it(copied, text):
    (copied / "dataset.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot use .*dataset\.json"):
        read_dataset(copied)


def test_a_folder_without_a_dataset_is_told_how_to_make_one(tmp_path):
    for root, words in ((tmp_path, "holds no dataset.json"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UserError, match=words) as caught:
            read_dataset(root)
        assert "lockstep pack" in caught.value.mend


def test_a_split_that_is_not_there_is_an_error_that_lists_the_others(photo_dataset):
    with pytest.raises(UserError, match="no split 'test'") as caught:
        read_dataset(photo_dataset).split("test")
    assert "train, val" in caught.value.mend
