"""What is packed besides pictures: class numbers, labels, masks; and what dataset.json says of them."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_pipeline.dataset_summary import remarks, summed
from data_pipeline.fault import UserError
from data_pipeline.index import read_dataset
from data_pipeline.items import Item, Source, SourceOptions
from data_pipeline.pack import pack
from data_pipeline.shard_index import read_shard_index
from data_pipeline.shard_result import ShardResult, Tally
from data_pipeline.sources import find_source

SHARDS = {"workers": 1, "seed": 0, "shard_samples": 10, "shard_bytes": 1 << 30}


def members(root, split="train"):
    """The bytes of each member by its name."""
    found = {}
    for shard in read_dataset(root).split(split).shards:
        with tarfile.open(root / shard.name) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def indexes(root, split="train"):
    dataset = read_dataset(root)
    return [read_shard_index(root / shard.index_name, shard) for shard in dataset.split(split).shards]


def test_class_numbers_are_in_the_tars_and_in_the_index(photo_dataset):
    found = members(photo_dataset)
    for index in indexes(photo_dataset):
        assert index.labels.dtype == np.int32
        assert [found[f"{key}.cls"] for key in index.keys] == [str(one).encode() for one in index.labels]


def test_labels_are_in_the_tars_and_in_the_index_and_missing_ones_stay_missing(multilabel_dataset):
    dataset = read_dataset(multilabel_dataset)
    assert (dataset.task, dataset.members.target) == ("multilabel", "json")
    for split in ("train", "val"):
        found, rows = members(multilabel_dataset, split), []
        for index in indexes(multilabel_dataset, split):
            assert index.labels.dtype == np.int8
            for key, row in zip(index.keys, index.labels.tolist(), strict=True):
                labels = json.loads(found[f"{key}.json"])["labels"]
                assert list(labels) == list(dataset.classes)
                assert [-1 if one is None else one for one in labels.values()] == row
                rows.append(row)
        labels = np.array(rows)
        assert set(np.unique(labels)) == {-1, 0, 1}
        assert dataset.split(split).class_counts == tuple((labels == 1).sum(axis=0))


def test_masks_are_in_the_tars_and_their_pixels_are_counted(segmentation_dataset, mask_folder):
    dataset = read_dataset(segmentation_dataset)
    assert (dataset.task, dataset.members.target) == ("segmentation", "mask.png")
    assert (dataset.classes, dataset.mask_values) == (("background", "foreground"), (0, 255))
    for split in ("train", "val"):
        found = members(segmentation_dataset, split)
        masks = {name: data for name, data in found.items() if name.endswith(".mask.png")}
        pixels = [np.asarray(Image.open(io.BytesIO(data))) for data in masks.values()]
        counts = tuple(sum(int((one == value).sum()) for one in pixels) for value in (0, 255))
        assert dataset.split(split).class_counts == counts
        for name, data in masks.items():
            stem = name.removesuffix(".mask.png")
            assert data == (mask_folder / "masks" / f"{stem}.png").read_bytes()
        for index in indexes(segmentation_dataset, split):
            assert (index.labels.dtype, index.labels.shape) == (np.int8, (len(index), 0))


def pairs(folder, masks):
    """A source of one grey picture a mask."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number, mask in enumerate(masks):
        Image.new("L", (8, 6), 40 * number).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder


def mask_of(*values):
    flat = np.resize(np.array(values, np.uint8), 48)
    return flat.reshape(6, 8)


def packed_pairs(tmp_path, *values, classes=()):
    folder = pairs(tmp_path / "source", [mask_of(*some) for some in values])
    source = find_source(folder, SourceOptions(val_fraction=0.0, classes=classes))
    return pack(source, tmp_path / "root", **SHARDS)


@pytest.mark.parametrize(
    ("values", "classes", "expected"),
    [
        ([(0, 255), (0,)], (), (("background", "foreground"), (0, 255), (72, 24))),
        ([(0, 1), (1,)], (), (("background", "foreground"), (0, 1), (24, 72))),
        ([(0,)], (), (("background", "foreground"), (0, 255), (48, 0))),
        ([(0, 1, 2, 255)], (), (("0", "1", "2"), (0, 1, 2), (12, 12, 12))),
        ([(0, 1, 255)], (), (("0", "1"), (0, 1), (16, 16))),
        ([(0, 253)], (), (tuple(map(str, range(254))), tuple(range(254)), (24, *[0] * 252, 24))),
        ([(0, 255)], ("soil", "root"), (("soil", "root"), (0, 255), (24, 24))),
        ([(0, 1)], ("soil", "root"), (("soil", "root"), (0, 1), (24, 24))),
        ([(0, 1)], ("a", "b", "c"), (("a", "b", "c"), (0, 1, 2), (24, 24, 0))),
    ],
)
def test_the_values_of_the_masks_tell_the_classes(tmp_path, values, classes, expected):
    train = packed_pairs(tmp_path, *values, classes=classes).dataset
    assert (train.classes, train.mask_values, train.split("train").class_counts) == expected
    assert read_dataset(tmp_path / "root") == train


@pytest.mark.parametrize(
    ("values", "classes", "words"),
    [
        ((0, 7, 254), (), "3 different values, up to 254: more than 254 classes, or no masks at all"),
        ((0, 1, 2), ("a", "b"), "2 classes are named, but the masks hold the values 0, 1, 2"),
        ((0, 255), ("a", "b", "c"), "3 classes are named, but the masks hold the values 0, 255"),
        (range(12), ("a", "b"), "the masks hold the values 0, 1, 2, 3, 4, 5, 6, 7 … 11"),
    ],
)
def test_values_that_fit_no_classes_are_an_error(tmp_path, values, classes, words):
    with pytest.raises(UserError, match=words) as caught:
        packed_pairs(tmp_path, values, classes=classes)
    assert caught.value.code == "DATA"
    assert not (tmp_path / "root" / "dataset.json").exists()


def test_a_mask_that_does_not_fit_or_cannot_be_read_is_left_out_with_its_picture(tmp_path):
    folder = pairs(tmp_path / "source", [mask_of(0, 255)] * 4)
    Image.new("L", (8, 5)).save(folder / "masks" / "1.png")
    (folder / "masks" / "2.png").write_bytes(b"no mask")
    (folder / "images" / "3.png").write_bytes(b"no picture")
    result = pack(find_source(folder, SourceOptions(val_fraction=0.0)), tmp_path / "root", **SHARDS)
    rows = [json.loads(line) for line in (tmp_path / "root" / "bad_files.jsonl").read_text().splitlines()]
    reasons = {row["path"].removeprefix(f"{folder}/"): row["error"] for row in rows}
    assert reasons.keys() == {"masks/1.png", "masks/2.png", "images/3.png"}
    assert "8 x 5" in reasons["masks/1.png"]
    assert "8 x 6" in reasons["masks/1.png"]
    assert members(tmp_path / "root").keys() == {"0.png", "0.mask.png"}
    assert result.dataset.split("train").class_counts == (24, 24)


def test_pictures_and_masks_are_made_smaller_together(segmentation_dataset, mask_folder, tmp_path):
    source = find_source(mask_folder, SourceOptions(val_fraction=0.25))
    pack(source, tmp_path / "root", **SHARDS, resize_shorter=20)
    found = {**members(tmp_path / "root"), **members(tmp_path / "root", "val")}
    sizes = {name: Image.open(io.BytesIO(data)).size for name, data in found.items()}
    masks = [name for name in sizes if name.endswith(".mask.png")]
    assert len(masks) == 24
    for mask in masks:
        picture = next(name for name in sizes if name.split(".")[0] == mask.split(".")[0] and name != mask)
        assert sizes[mask] == sizes[picture]
        assert min(sizes[mask]) == 20
        assert set(np.unique(Image.open(io.BytesIO(found[mask])))) <= {0, 255}


def test_masks_that_look_like_grey_levels_are_remarked_on(tmp_path):
    said = packed_pairs(tmp_path, (0, 128, 255)).remarks
    assert said[0].startswith("warning: the training split has no pixel of '1', '2', '3' and 124 more")
    assert said[1].startswith(
        "warning: the masks are taken for class numbers from 0 to 128: if they are grey"
    )
    assert len(said) == 2


def test_missing_labels_and_labels_that_nobody_has_are_remarked_on(tmp_path):
    Image.new("L", (4, 4), 9).save(tmp_path / "a.png")
    targets = [(1, 0, -1), (0, 0, -1), (1, -1, 0)]
    items = [Item(str(tmp_path / "a.png"), str(key), "train", one) for key, one in enumerate(targets)]
    source = Source("multilabel", ("a", "b", "größe"), tuple(items), "a test")
    result = pack(source, tmp_path / "root", **SHARDS)
    assert result.remarks == (
        "3 of 9 labels are missing, and stay so: they count in no loss",
        "warning: the training split has no sample of 'b', 'größe': nobody can learn that",
    )
    assert result.dataset.split("train").class_counts == (2, 0, 0)
    assert "größe" in members(tmp_path / "root")["0.json"].decode()


def result_of(samples, number=0, split="train", **tally):
    sums = {
        **{"class_counts": [samples], "missing": 0, "mask_values": [0] * 256, "histogram": [[1] * 256] * 3},
        **{"coloured": False, "progressive": 0, "keys_digest": 2**64 - 1, **tally},
    }
    name = f"{split}-{number:06d}.tar"
    return ShardResult(name, split, samples, 1, "0" * 64, 1, "0" * 64, Tally(**sums), [])


@pytest.mark.parametrize(("samples", "shards", "said"), [(1429, 7, True), (1428, 7, False), (1429, 8, False)])
def test_many_samples_in_few_tars_are_remarked_on(samples, shards, said):
    results = [result_of(samples, number) for number in range(shards)]
    dataset = summed(Source("multiclass", ("a",), (), ""), results)
    expected = (
        "warning: train has 10,003 samples in 7 shards: 8 or more mix and stream better: pack again with a "
        "smaller --shard-samples"
    )
    assert remarks(dataset, results) == ([expected] if said else [])
    assert dataset.split("train").keys_digest == f"{2**64 - shards:016x}"


@pytest.mark.parametrize("results", [[], [result_of(0)], [result_of(3, split="val")]])
def test_nothing_to_train_on_is_an_error(results):
    with pytest.raises(UserError, match="no picture in the training split"):
        summed(Source("multilabel", ("a",), (), ""), results)
