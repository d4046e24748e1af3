"""What we pack is plain tars: webdataset and Python's tarfile find the pixels and labels that we find."""

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.decode import decode
from data_pipeline.index import IMAGE_EXTENSIONS, read_dataset
from data_pipeline.masks import read_mask
from data_pipeline.read import ShardReader
from data_pipeline.store import Folder

DATASETS = ("photo_dataset", "multilabel_dataset", "segmentation_dataset")


@pytest.fixture(params=DATASETS)
def root(request):
    return request.getfixturevalue(request.param)


def ours(root, split):
    """Key -> pixels [H, W, 3] and class number, labels or mask [H, W], as training reads them."""
    dataset = read_dataset(root)
    reader = ShardReader(Folder(root), dataset, split)
    found = {}
    for raw in reader.read_many(np.arange(dataset.split(split).samples)):
        assert raw.fault is None
        target = read_mask(bytes(raw.mask)) if dataset.task == "segmentation" else raw.label
        found[raw.key] = decode(bytes(raw.image), mode="RGB"), target
    reader.close()
    return found


def urls(root, split):
    return [str(root / shard.name) for shard in read_dataset(root).split(split).shards]


def labels_of(dataset, given):
    return [-1 if given["labels"][name] is None else given["labels"][name] for name in dataset.classes]


@pytest.mark.parametrize("split", ["train", "val"])
def test_webdataset_decodes_the_same_pixels_and_targets(root, split):
    dataset, expected = read_dataset(root), ours(root, split)
    keys = []
    for sample in webdataset.WebDataset(urls(root, split), shardshuffle=False).decode("pil"):
        pixels, target = expected[sample["__key__"]]
        picture = next(sample[name] for name in IMAGE_EXTENSIONS if name in sample)
        assert np.array_equal(np.asarray(picture.convert("RGB")), pixels)
        if dataset.task == "multiclass":
            assert sample["cls"] == target
        elif dataset.task == "multilabel":
            assert labels_of(dataset, sample["json"]) == target.tolist()
        else:
            assert np.array_equal(np.asarray(sample["mask.png"].convert("L")), target)
        keys.append(sample["__key__"])
    assert keys == list(expected)


@pytest.mark.parametrize("split", ["train", "val"])
def test_tarfile_finds_the_same_pixels_and_targets(root, split):
    dataset, expected = read_dataset(root), ours(root, split)
    seen = set()
    for url in urls(root, split):
        with tarfile.open(url) as tar:
            for member in tar:
                assert (member.isreg(), member.mtime, member.uid) == (True, 0, 0)
                key, extension = member.name.split(".", 1)
                data = tar.extractfile(member).read()
                pixels, target = expected[key]
                if extension == "cls":
                    assert int(data) == target
                elif extension == "json":
                    assert labels_of(dataset, json.loads(data)) == target.tolist()
                elif extension == "mask.png":
                    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), target)
                else:
                    picture = Image.open(io.BytesIO(data)).convert("RGB")
                    assert np.array_equal(np.asarray(picture), pixels)
                seen.add((key, extension in IMAGE_EXTENSIONS))
    assert seen == {(key, is_image) for key in expected for is_image in (True, False)}
