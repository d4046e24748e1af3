import shutil

import numpy as np
import pytest
from PIL import Image

from data_pipeline.fault import UserError
from data_pipeline.sources import SourceOptions, find_source


@pytest.fixture
def make(photographs, tmp_path):
    """Writes small pictures at paths relative to the root, masks where the path says so."""

    def write(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            crop = np.ascontiguousarray(photographs["cat"][:8, :9])
            grey = "mask" in name or "label" in name
            Image.fromarray(crop[..., 0] if grey else crop).save(path)
        return tmp_path

    return write


def found(root, **options):
    source = find_source(root, SourceOptions(**options))
    assert source.task == "segmentation"
    return {
        (item.split, item.key): (
            item.path.relative_to(root).as_posix(),
            item.target.relative_to(root).as_posix(),
        )
        for item in source.items
    }


def wrong(root, **options):
    with pytest.raises(UserError) as caught:
        find_source(root, SourceOptions(**options))
    assert caught.value.code == "DATA"
    return caught.value.what


@pytest.mark.parametrize(
    ("images", "masks"), [("images", "masks"), ("Image", "Label"), ("img", "mask"), ("imgs", "annotations")]
)
def test_a_folder_of_images_beside_one_of_masks_is_pairs(make, images, masks):
    root = make(*(f"{images}/{n}.jpg" for n in range(10)), *(f"{masks}/{n}.png" for n in range(10)))
    source = find_source(root, SourceOptions(classes=("cell", "border")))
    assert source.classes == ("cell", "border")
    assert [item.key for item in source.items] == list("0123456789")
    assert all(item.target == root / masks / f"{item.key}.png" for item in source.items)
    assert [item.split for item in source.items].count("val") == 2
    assert source.kind == f"images in '{images}' with masks in '{masks}', 20% of them held out for val"


@pytest.mark.parametrize(
    "name", ["{}_mask", "{}_seg", "{}_label", "mask_{}", "{}_L", "{}.jpg", "truth-{}", "{}_mask_v2"]
)
def test_what_all_masks_have_in_their_names_is_stripped(make, name):
    root = make(
        *(f"images/a/{n}.jpg" for n in range(12)), *(f"masks/a/{name.format(n)}.png" for n in range(12))
    )
    pairs = found(root, val_fraction=0)
    assert pairs["train", "a/11"] == ("images/a/11.jpg", f"masks/a/{name.format(11)}.png")
    assert len(pairs) == 12
    assert name.format("IMAGE")[:-7] in find_source(root, SourceOptions()).kind


def test_numbers_are_no_addition_to_a_name(make):
    root = make(*(f"images/{n}.png" for n in range(1, 10)), *(f"masks/{n}.png" for n in range(11, 20)))
    assert "the image" in wrong(root)


def test_what_has_no_partner_is_named(make):
    root = make(*(f"images/{n}.jpg" for n in range(30)), *(f"masks/{n}_mask.png" for n in range(4, 32)))
    told = wrong(root).splitlines()
    assert told[0] == f"the image '{root}/images/0.jpg' has no mask in '{root}/masks'"
    assert f"the mask '{root}/masks/30_mask.png' has no image in '{root}/images'" in told
    assert len(told) == 6
    for number in range(4, 20):
        (root / "masks" / f"{number}_mask.png").unlink()
    told = wrong(root).splitlines()
    assert len(told) == 11
    assert told[-1] == "and 12 more like these"


def test_two_files_of_one_name_and_masks_that_are_jpegs_are_refused(make):
    root = make("images/a.png", "images/a.jpg", "images/b.png", "masks/a.png", "masks/b.jpg")
    told = wrong(root)
    assert "a.jpg' and " in told
    assert "masks/b.jpg' is a JPEG" in told


@pytest.mark.parametrize("above", [True, False])
def test_splits_are_told_by_folders_above_or_below(make, above):
    def place(split, kind):
        return f"{split}/{kind}" if above else f"{kind}/{split}"

    names = [
        f"{place(split, kind)}/{n}.png"
        for split in ("train", "valid", "test")
        for kind in ("image", "mask")
        for n in "ab"
    ]
    root = make(*names)
    pairs = found(root)
    assert sorted(pairs) == [(split, key) for split in ("test", "train", "val") for key in "ab"]
    assert pairs["val", "a"] == (f"{place('valid', 'image')}/a.png", f"{place('valid', 'mask')}/a.png")
    shutil.rmtree(root / place("test", "mask"))
    assert len(found(root)) == 4
    assert find_source(root, SourceOptions()).kind.endswith(
        "left out, as they have no masks: 'test'"
        if above
        else "left out, as they have no masks: 'image/test'"
    )
    shutil.rmtree(root / place("valid", "mask"))
    assert place("valid", "image") in wrong(root) or "valid' holds no folder" in wrong(root)


def test_where_only_training_has_masks_a_share_is_held_out(make):
    root = make(*(f"train/{kind}/{n}.png" for kind in ("image", "label") for n in range(30)), "test/0.png")
    splits = [split for split, _ in found(root)]
    assert (splits.count("train"), splits.count("val")) == (24, 6)
    assert "left out, as they have no masks: 'test'" in find_source(root, SourceOptions()).kind


def test_the_folders_can_be_named(make):
    root = make("a/1.png", "a/2.png", "b_masks/1.png", "b_masks/2.png", "c/1.png")
    assert len(found(root, images=root / "a", masks=root / "b_masks")) == 2
    (root / "b_masks").rename(root / "masks")
    assert len(found(root, images=root / "a")) == 2
    (root / "masks").rename(root / "b_masks")
    source = find_source(root / "a", SourceOptions(masks=root / "b_masks"))
    assert [item.target.name for item in source.items] == ["1.png", "2.png"]
    assert "no folder" in wrong(root / "a", masks=root / "nowhere")


def test_masks_inside_the_folder_of_images_are_no_images(make):
    root = make("1.png", "2.png", "masks/1.png", "masks/2.png")
    assert sorted(key for _, key in found(root, masks=root / "masks")) == ["1", "2"]


def test_two_folders_that_may_be_the_masks_are_an_error(make):
    assert "either may be meant" in wrong(make("images/1.png", "masks/1.png", "labels/1.png"))


def test_a_folder_without_masks_says_what_is_there_instead(make):
    root = make("images/1.png")
    (root / "labels").mkdir()
    assert "holds no masks" in wrong(root)
    (root / "labels" / "1.txt").touch()
    assert "only other files such as '1.txt'" in wrong(root)
    shutil.rmtree(root / "labels")
    assert "no folder of images with one of masks" in wrong(root, kind="pairs")
