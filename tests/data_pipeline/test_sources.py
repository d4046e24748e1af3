import os
import shutil
from collections import Counter
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.fault import UserError
from data_pipeline.sources import Item, SourceOptions, find_source


def wrong(root, code="DATA", **options):
    with pytest.raises(UserError) as caught:
        find_source(root, SourceOptions(**options))
    assert caught.value.code == code
    return caught.value.what


@pytest.fixture
def touch(tmp_path):
    def write(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return write


def test_a_folder_per_class_is_divided_class_by_class(photo_folder):
    source = find_source(photo_folder, SourceOptions(val_fraction=0.25))
    assert (source.task, source.classes) == ("multiclass", ("astronaut", "cat", "coffee"))
    assert source.kind == "a folder per class, 25% of each class held out for val"
    counts = Counter((item.split, item.target) for item in source.items)
    assert counts == {
        (split, label): count for split, count in (("train", 15), ("val", 5)) for label in range(3)
    }
    assert [item.key for item in source.items] == sorted(item.key for item in source.items)
    assert all(
        item.path.is_file() and item.path.parent.name == source.classes[item.target] for item in source.items
    )


def test_classes_can_be_put_in_another_order_but_not_be_left_out(photo_folder):
    names = ("coffee", "cat", "astronaut")
    source = find_source(photo_folder, SourceOptions(classes=names))
    assert source.classes == names
    assert all(item.path.parent.name == names[item.target] for item in source.items)
    assert "astronaut' is none of the classes" in wrong(photo_folder, classes=names[:2])
    wrong(photo_folder, "USAGE", classes=("cat", "cat"))


@settings(max_examples=30, deadline=None)
@given(st.randoms(), st.integers(0, 9))
def test_the_order_in_which_files_were_made_changes_nothing(tmp_path_factory, random, seed):
    names = [f"{label}/{number}.png" for label in "ab" for number in range(9)]
    found = []
    for _ in range(2):
        root = tmp_path_factory.mktemp("any") / "source"
        random.shuffle(names)
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        source = find_source(root, SourceOptions(seed=seed, val_fraction=0.3))
        found.append(
            [(item.path.relative_to(root), item.key, item.split, item.target) for item in source.items]
        )
    assert found[0] == found[1]


def test_splits_by_folder_stay_and_a_lone_folder_for_training_is_divided(touch):
    names = [f"{split}/{label}/{n}.png" for split in ("train", "test") for label in "ab" for n in range(5)]
    root = touch(*names)
    splits = Counter(item.split for item in find_source(root, SourceOptions()).items)
    assert splits == {"train": 10, "test": 10}
    shutil.rmtree(root / "test")
    splits = Counter(item.split for item in find_source(root, SourceOptions()).items)
    assert splits == {"train": 8, "val": 2}


def test_pictures_that_no_class_claims_are_left_out_in_words(touch):
    root = touch("train/a/1.png", "train/b/1.png", "test/1.png", "test/2.jpg", "test/notes.txt")
    source = find_source(root, SourceOptions())
    assert len(source.items) == 2
    assert source.kind.endswith("left out, as they lie in no folder of a class: pictures (2 in test)")


def test_folders_of_splits_beside_others_are_not_guessed_at(touch):
    assert "beside them 'extra'" in wrong(touch("train/a/1.png", "val/a/1.png", "extra/a/1.png"))


def test_a_class_may_be_called_train(touch):
    source = find_source(touch("train/1.png", "plane/1.png"), SourceOptions())
    assert source.classes == ("plane", "train")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["1.png", "2.png"], "holds 2 pictures, but no folder"),
        (["notes.txt"], "is empty"),
        (["a/1.png", "b/notes.txt"], "b' holds no pictures"),
        (["train/1.png", "val/2.png"], "no folder of a class for training"),
        (["val/a/1.png"], "no folder of a class for training"),
    ],
)
def test_a_folder_in_which_there_is_nothing_to_learn_is_an_error(touch, names, words):
    assert words in wrong(touch(*names))


def test_links_to_folders_are_followed_but_not_round_in_circles(touch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "2.png").touch()
    root = touch("a/1.png", "b/1.png")
    (root / "a" / "more").symlink_to(elsewhere)
    (root / "a" / "again").symlink_to(root / "a")
    (root / "b" / "self.png").symlink_to("self.png")
    keys = [item.key for item in find_source(root, SourceOptions()).items]
    assert keys == ["a/1", "a/more/2", "b/1", "b/self"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_an_error(touch):
    root = touch("a/1.png", "a/locked/2.png")
    (root / "a" / "locked").chmod(0)
    assert "cannot list" in wrong(root)


def test_keys_fit_webdataset_and_are_unique_within_a_split(touch):
    root = touch(
        "a/v1.2.png", "a/v1_2.png", "a/x.jpg", "a/x.png", "a/x~2.png", "a/.hidden.png", "a/d.e/f.png"
    )
    (root / "a" / os.fsdecode(b"caf\xe9.png")).touch()
    keys = [item.key for item in find_source(root, SourceOptions(val_fraction=0)).items]
    assert sorted(keys) == sorted(["a/caf\\xe9", "a/d_e/f", "a/v1_2", "a/v1_2~2", "a/x", "a/x~2", "a/x~2~2"])


def test_the_kind_is_found_by_looking_and_can_be_said(photo_folder, mask_folder, photo_table, tmp_path):
    assert find_source(photo_folder, SourceOptions()).task == "multiclass"
    assert find_source(mask_folder, SourceOptions()).task == "segmentation"
    assert find_source(photo_table, SourceOptions(images=photo_folder)).task == "multilabel"
    as_classes = find_source(mask_folder, SourceOptions(kind="folders"))
    assert as_classes.classes == ("images", "masks")
    table = shutil.copy(photo_table, tmp_path / "table.txt")
    assert "is a file, but no .csv or .tsv" in wrong(table)
    said = find_source(table, SourceOptions(kind="csv", images=photo_folder))
    assert said == find_source(photo_table, SourceOptions(images=photo_folder))
    assert "no folder" in wrong(tmp_path / "nowhere")
    assert "no file" in wrong(tmp_path / "nowhere.csv", kind="csv")


@pytest.mark.parametrize(
    "option", ["label_columns", "image_column", "split_column", "group_column", "images", "masks"]
)
def test_an_option_that_the_kind_cannot_use_is_refused(photo_folder, option):
    value = {"label_columns": ("a",), "images": photo_folder, "masks": photo_folder}.get(option, "a")
    told = wrong(photo_folder, "USAGE", kind="folders", **{option: value})
    assert ("--labels" if option == "label_columns" else f"--{option.replace('_', '-')}") in told


def test_an_item_cannot_be_changed_and_is_small():
    item = Item("a.png", "a", "train", 0)
    with pytest.raises(FrozenInstanceError):
        item.split = "val"
    assert not hasattr(item, "__dict__")


def test_pictures_of_every_kind_are_found(touch):
    names = ["1.jpg", "2.JPEG", "3.png", "4.webp", "5.bmp", "6.tif", "7.TIFF", "8.ppm", "9.pgm"]
    root = touch(*(f"a/{name}" for name in names), "a/10.gif", "a/11.txt")
    assert len(find_source(root, SourceOptions()).items) == 9


def test_a_picture_that_is_a_dangling_link_is_kept_for_whoever_reads_it(photo_folder, tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.png").symlink_to(tmp_path / "nowhere.png")
    assert len(find_source(tmp_path, SourceOptions()).items) == 2
