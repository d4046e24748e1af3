"""The page on the format is enough to write a reader: the one that it shows reads what lockstep reads."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

import data_pipeline
from data_pipeline.index import FORMAT, read_dataset
from data_pipeline.read import ShardReader
from data_pipeline.shard_index import ARRAYS
from data_pipeline.store import Folder

PAGE = Path(data_pipeline.__file__).with_name("FORMAT.md").read_text(encoding="utf-8")
DATASETS = ["photo_dataset", "multilabel_dataset", "segmentation_dataset"]


@pytest.fixture(scope="session")
def read_split():
    """The reader of the page."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    space: dict = {}
    exec(compile(block, "FORMAT.md", "exec"), space)  # noqa: S102 (the page's own code, which is what is tested)
    return space["read_split"]


@pytest.mark.parametrize("name", DATASETS)
def test_the_reader_of_the_page_reads_what_lockstep_reads(name, read_split, request):
    root = request.getfixturevalue(name)
    dataset = read_dataset(root)
    for split in dataset.splits:
        found = list(read_split(root, split))
        reader = ShardReader(Folder(root), dataset, split)
        expected = reader.read_many(np.arange(dataset.split(split).samples))
        reader.close()
        assert [key for key, _, _ in found] == [raw.key for raw in expected]
        assert [image for _, image, _ in found] == [raw.image for raw in expected]
        for (_, _, target), raw in zip(found, expected, strict=True):
            assert raw.fault is None
            assert np.array_equal(target, raw.label) if raw.mask is None else target == raw.mask


def test_the_reader_of_the_page_follows_tars_that_lie_elsewhere(photo_dataset, read_split, tmp_path):
    expected = list(read_split(photo_dataset, "val"))
    for path in photo_dataset.iterdir():
        if path.suffix != ".tar":
            shutil.copy(path, tmp_path / path.name)
    described = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**described, "tars": str(photo_dataset)}))
    assert list(read_split(tmp_path, "val")) == expected


@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_the_reader_of_the_page_notices_every_damage(photo_dataset, read_split, tmp_path, suffix):
    root = shutil.copytree(photo_dataset, tmp_path / "copy")
    shard = read_dataset(root).split("val").shards[0]
    path = (root / shard.name).with_suffix(suffix)
    with tarfile.open(root / shard.name) as tar:
        place = next(member.offset_data for member in tar if not member.name.endswith("cls"))
    data = bytearray(path.read_bytes())
    data[place + 100 if suffix == ".tar" else -1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AssertionError, match="damaged"):
        list(read_split(root, "val"))


def test_the_page_names_every_field_and_array(photo_dataset):
    described = json.loads((photo_dataset / "dataset.json").read_text())
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    example = json.loads(example)
    assert example.keys() == described.keys()
    assert example["splits"]["train"].keys() == described["splits"]["train"].keys()
    assert example["splits"]["train"]["shards"][0].keys() == described["splits"]["train"]["shards"][0].keys()
    assert example["members"].keys() == described["members"].keys()
    assert example["format"] == FORMAT
    for name in (*described, *ARRAYS, "labels", *described["splits"]["train"]):
        assert re.search(rf"`(….)?{name}`", PAGE), name


def test_the_example_of_the_page_is_a_data_set_that_lockstep_accepts(tmp_path):
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "dataset.json").write_text(example)
    assert read_dataset(tmp_path).split("train").samples == 6
