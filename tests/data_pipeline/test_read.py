import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.decode import decode_sample
from data_pipeline.fault import UserError
from data_pipeline.index import index_path, read_dataset, read_shard_index
from data_pipeline.plan import Work
from data_pipeline.read import ShardReader
from data_pipeline.targets import class_number

WORK = Work(0, 0, 0, 1, np.arange(1), valid=True)


def read_all(root, split, *, open_shards=32):
    found = read_dataset(root).split(split)
    reader = ShardReader(root, found, open_shards=open_shards)
    try:
        return [reader.read(number, WORK) for number in range(found.samples)]
    finally:
        reader.close()


@pytest.fixture
def damaged(photo_dataset, tmp_path):
    """A copy in which one bit of the third sample's class is another, and where that is."""
    root = shutil.copytree(photo_dataset, tmp_path / "damaged")
    shard = read_dataset(root).split("train").shards[1]
    index = read_shard_index(index_path(root / shard.name), shard)
    column = index.extensions.index("cls")
    offset = int(index.offset[2, column])
    data = bytearray((root / shard.name).read_bytes())
    data[offset] ^= 1
    (root / shard.name).write_bytes(data)
    return root, {"shard": shard.name, "member": f"{index.keys[2]}.cls", "offset": offset}


def test_every_sample_is_read_with_its_number_key_and_place(photo_dataset):
    samples = read_all(photo_dataset, "train")
    assert [sample.number for sample in samples] == list(range(48))
    assert len({sample.key for sample in samples}) == 48
    for sample in samples:
        with tarfile.open(photo_dataset / sample.shard) as tar:
            members = [member for member in tar if member.name.startswith(f"{sample.key}.")]
        assert sample.offset == min(member.offset_data for member in members)


def test_one_bit_of_damage_is_found_and_its_place_named(damaged):
    root, place = damaged
    with pytest.raises(
        UserError, match=f"'{place['shard']}': {place['member']} is not the 1 bytes"
    ) as caught:
        read_all(root, "train")
    assert caught.value.place == place
    assert caught.value.code == "DATA"


def test_the_other_samples_of_a_damaged_shard_are_read(damaged):
    root, _ = damaged
    reader = ShardReader(root, read_dataset(root).split("train"))
    assert [reader.read(number, WORK).number for number in (10, 11, 13, 19)] == [10, 11, 13, 19]
    reader.close()


@pytest.mark.parametrize("split", ["train", "val"])
def test_webdataset_reads_the_same_pixels_and_labels(photo_dataset, split):
    dataset = read_dataset(photo_dataset)
    urls = [str(photo_dataset / shard.name) for shard in dataset.split(split).shards]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    ours = read_all(photo_dataset, split)
    assert len(theirs) == len(ours) == dataset.split(split).samples
    for one, other in zip(ours, theirs, strict=True):
        picture = other.get("jpg") or other.get("png")
        assert one.key == other["__key__"]
        assert class_number(one, 3) == other["cls"]
        assert np.array_equal(decode_sample(one, mode="RGB"), np.asarray(picture.convert("RGB")))


def test_pythons_own_tarfile_reads_the_same_pixels_and_labels(photo_dataset):
    for sample in read_all(photo_dataset, "val"):
        with tarfile.open(photo_dataset / sample.shard) as tar:
            members = {name: tar.extractfile(f"{sample.key}.{name}").read() for name in sample.members}
        picture = Image.open(io.BytesIO(members.get("jpg") or members.get("png"))).convert("RGB")
        assert int(members["cls"]) == class_number(sample, 3)
        assert np.array_equal(decode_sample(sample, mode="RGB"), np.asarray(picture))


def test_labels_are_the_folders_that_the_pictures_came_from(photo_dataset):
    classes = read_dataset(photo_dataset).classes
    for sample in read_all(photo_dataset, "train"):
        assert sample.key.split("/")[0] == classes[class_number(sample, 3)]


def test_few_shards_stay_open_and_none_after_closing(photo_dataset):
    def open_tars():
        return sum(link.resolve().suffix == ".tar" for link in Path("/proc/self/fd").iterdir())

    split = read_dataset(photo_dataset).split("train")
    reader = ShardReader(photo_dataset, split, open_shards=2)
    keys = [reader.read(number, WORK).key for number in (0, 10, 20, 30, 0, 40)]
    assert keys[0] == keys[4]
    assert open_tars() == 2
    reader.close()
    assert open_tars() == 0


def test_a_damaged_index_leaves_no_shard_open(photo_dataset, tmp_path):
    root = shutil.copytree(photo_dataset, tmp_path / "copy")
    split = read_dataset(root).split("train")
    index_path(root / split.shards[0].name).unlink()
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = ShardReader(root, split)
    for _ in range(3):
        with pytest.raises(UserError):
            reader.read(0, WORK)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_label_that_is_no_class_is_refused(photo_dataset):
    sample = read_all(photo_dataset, "val")[0]
    for label in (b"3", b"-1", b"1.0", b"", b"1_0", "\u0663".encode(), b"9" * 5000, None):
        members = {"jpg": b""} if label is None else {"cls": label}
        with pytest.raises(UserError, match="allowed are 0 to 2") as caught:
            class_number(sample._replace(members=members), 3)
        assert caught.value.place["member"] == f"{sample.key}.cls"
    assert class_number(sample._replace(members={"cls": b" 2\n"}), 3) == 2
