"""Pictures that lie about as files: found in their order, and read as if they had been packed."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.batch import Pixels, Size
from data_pipeline.decode import decode
from data_pipeline.fault import UserError
from data_pipeline.file_reader import FileReader, PictureList
from data_pipeline.index import DatasetIndex, read_dataset
from data_pipeline.picture_source import find_pictures
from data_pipeline.pictures import picture_bytes, stored_picture
from data_pipeline.plan import evaluation_work
from data_pipeline.produce import Recipe
from data_pipeline.store import Folder
from data_pipeline.stream import stream
from data_pipeline.transforms import TRANSFORMS
from data_pipeline.unframing import fixes_size, way_back

CROP = (("resized_center_crop", {"size": 24, "shorter": 28}),)
READERS = [
    {"workers": 0},
    {"workers": 2, "kind": "threads"},
    {"workers": 2, "kind": "processes"},
]


def index(classes=("a", "b", "c")):
    return DatasetIndex("multiclass", classes, "RGB", (0.5,) * 3, (0.2,) * 3, {})


def recipe_of(pictures, transforms=CROP):
    return Recipe(pictures, index(), "", transforms, seed=0, unlabelled=True)


def read_all(recipe, samples, *, batch=8, workers=0, kind="threads"):
    """Key, pixels, size and error of every sample."""

    def work():
        return evaluation_work(samples, batch=batch, process=0, processes=1)

    rows = []
    for one in stream(recipe, work, workers=workers, prefetch=2, kind=kind):
        errors = dict(zip(one.blank, one.bad, strict=True))
        for row, key in enumerate(one.keys):
            pixels = one.images[row].numpy().copy()
            assert row not in errors or (errors[row].key, errors[row].replaced_by) == (key, "")
            error = errors[row].exception if row in errors else None
            rows.append((key, pixels, tuple(one.sizes[row].tolist()), error))
    return rows


def code_of(source):
    with pytest.raises(UserError) as caught:
        find_pictures(source)
    assert caught.value.mend
    return caught.value.code, caught.value.what


def test_a_folder_gives_its_pictures_and_those_below_sorted(photo_folder):
    found = find_pictures(photo_folder)
    files = [path for path in photo_folder.rglob("*") if path.is_file()]
    assert list(found.names) == sorted(path.relative_to(photo_folder).as_posix() for path in files)
    assert len(found.names) == 60
    assert FileReader(found).read(3).image == (photo_folder / found.names[3]).read_bytes()


def test_one_picture_is_called_by_its_name(photo_folder):
    found = find_pictures(photo_folder / "cat" / "01.jpg")
    assert (list(found.names), FileReader(found).samples) == (["01.jpg"], 1)
    assert FileReader(found).read(0).image == (photo_folder / "cat" / "01.jpg").read_bytes()


def test_a_list_keeps_its_order_its_duplicates_and_what_it_names_in_vain(photo_folder, tmp_path, monkeypatch):
    (tmp_path / "here.jpg").write_bytes((photo_folder / "cat" / "02.jpg").read_bytes())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "there.jpg").write_bytes((photo_folder / "cat" / "03.jpg").read_bytes())
    absolute = str(photo_folder / "cat" / "01.jpg")
    names = ["there.jpg", "here.jpg", absolute, "none.jpg", "here.jpg", " leading.jpg", "bad\0.jpg"]
    listed = tmp_path / "list.txt"
    listed.write_text("\ufeff" + "\r\n".join(names) + "\n\n  \n", encoding="utf-8")
    monkeypatch.chdir(elsewhere)
    found = find_pictures(listed)
    assert list(found.names) == names
    raws = FileReader(found).read_many(np.arange(7))
    assert [raw.key for raw in raws] == names
    assert raws[1].image == raws[4].image == (tmp_path / "here.jpg").read_bytes()
    assert raws[0].image == (elsewhere / "there.jpg").read_bytes()
    assert [raw.fault is None for raw in raws] == [True, True, True, False, True, False, False]
    assert raws[3].fault.what == "'none.jpg': No such file or directory"


def test_a_name_that_is_no_text_is_found_by_its_bytes(photo_folder, tmp_path):
    content = (photo_folder / "cat" / "01.jpg").read_bytes()
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb") as file:  # noqa: PTH123 - no text
        file.write(content)
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.jpg\n")
    assert FileReader(find_pictures(tmp_path / "list.txt")).read(0).image == content
    assert FileReader(find_pictures(tmp_path)).read(0).image == content


@pytest.mark.parametrize("column", ["image", "Path", "where_it_is"])
def test_a_csv_is_read_by_its_column_of_paths(photo_folder, tmp_path, column):
    names = [
        "cat/01.jpg",
        "coffee/00.png",
        "cat/01.jpg",
        "cat/gone.jpg",
        "",
        str(photo_folder / "cat" / "05.png"),
    ]
    listed = tmp_path / "list.csv"
    listed.write_text("\n".join([f"age,{column}", *(f"7,{name}" for name in names)]) + "\n")
    (tmp_path / "cat").symlink_to(photo_folder / "cat")
    (tmp_path / "coffee").symlink_to(photo_folder / "coffee")
    found = find_pictures(listed)
    assert list(found.names) == names
    raws = FileReader(found).read_many(np.arange(len(names)))
    assert [raw.fault.what if raw.fault else "" for raw in raws] == [
        *("", "", "", "'cat/gone.jpg': No such file or directory", "'': no picture is named", "")
    ]
    assert raws[0].image == (photo_folder / "cat" / "01.jpg").read_bytes()


def test_a_csv_may_leave_out_folders_and_extensions_as_for_packing(photo_folder, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "ISIC_1.jpg").write_bytes((photo_folder / "cat" / "01.jpg").read_bytes())
    (tmp_path / "list.csv").write_text("image_id,age\nISIC_1,7\n")
    found = find_pictures(tmp_path / "list.csv")
    assert (list(found.names), list(found.files)) == (["ISIC_1"], ["deep/ISIC_1.jpg"])


def test_a_source_without_pictures_is_refused_with_a_way_to_mend_it(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "long.txt").write_text("x" * 5000)
    (tmp_path / "rows.csv").write_text("image,age\n")
    (tmp_path / "other.csv").write_text("age,size\n7,8\n")
    (tmp_path / "bare.csv").write_text("a.jpg,1\nb.jpg,2\n")
    (tmp_path / "weights.bin").write_text("x")
    os.mkfifo(tmp_path / "pipe.txt")
    assert code_of(tmp_path / "none")[0] == "DATA"
    assert code_of(tmp_path / ("x" * 300))[0] == "DATA"
    assert code_of(tmp_path / "pipe.txt")[0] == "DATA"
    assert code_of(tmp_path / "empty") == ("DATA", f"no picture in '{tmp_path}/empty'")
    assert code_of(tmp_path / "blank.txt") == ("DATA", f"'{tmp_path}/blank.txt' names no picture")
    assert code_of(tmp_path / "long.txt")[0] == "DATA"
    assert code_of(tmp_path / "rows.csv")[0] == "DATA"
    assert code_of(tmp_path / "other.csv") == ("DATA", f"no column of '{tmp_path}/other.csv' names pictures")
    assert code_of(tmp_path / "bare.csv")[0] == "DATA"
    assert code_of(tmp_path / "weights.bin")[0] == "USAGE"


def odd_pictures(folder, image):
    """Files that packing does not keep as they are, and some that it does."""
    picture = Image.fromarray(image)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    picture.save(folder / "turned.png", exif=exif)
    picture.save(folder / "turned.webp", exif=exif)
    picture.save(folder / "turned.tif", exif=exif)
    picture.save(folder / "plain.webp")
    picture.save(folder / "plain.bmp")
    picture.save(folder / "plain.ppm")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("L").save(folder / "grey.jpg")
    picture.convert("1").save(folder / "black.png")
    picture.convert("RGBA").save(folder / "clear.png")
    picture.save(folder / "moving.png", save_all=True, append_images=[picture.rotate(90)])
    Image.fromarray(image[..., 0].astype(np.uint16) * 256).save(folder / "deep.png")
    Image.fromarray(image[..., 0].astype(np.float32)).save(folder / "real.tif")
    picture.save(folder / "called.png", "JPEG")


def test_a_file_is_read_as_the_bytes_that_packing_would_store(photographs, tmp_path):
    odd_pictures(tmp_path, np.ascontiguousarray(photographs["cat"][:40, :60]))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 16
    for path in files:
        assert picture_bytes(path) == stored_picture(path).data, path.name
    assert sum(picture_bytes(path) == path.read_bytes() for path in files) >= 6


def test_what_is_no_picture_is_refused_as_in_packing(photo_folder, tmp_path):
    whole = (photo_folder / "cat" / "00.png").read_bytes()
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_bytes(b"<html>no such picture</html>")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    names = ("empty.png", "text.jpg", "folder.jpg", "loop.jpg", "pipe.jpg", "x" * 300 + ".jpg")
    pictures = PictureList((*names, "half.png"), (*names, "half.png"), (str(tmp_path),))
    raws = FileReader(pictures).read_many(np.arange(7))
    assert [raw.fault is not None for raw in raws] == [True] * 6 + [False]
    rows = read_all(recipe_of(pictures), 7, batch=7)
    assert all(error for _, _, _, error in rows)
    assert "cannot decode" in rows[6][3]


@pytest.mark.parametrize("readers", READERS)
def test_a_broken_picture_leaves_its_row_black_and_the_others_as_they_are(photo_folder, tmp_path, readers):
    names = [f"{label}/{number:02d}.jpg" for label in ("cat", "coffee") for number in (1, 2, 3, 4, 6, 7)]
    whole = PictureList(names, names, (str(photo_folder),))
    expected = read_all(recipe_of(whole), 12, batch=4)
    assert [one[3] for one in expected] == [None] * 12
    (tmp_path / "half.jpg").write_bytes((photo_folder / names[9]).read_bytes()[:500])
    broken = {
        0: "gone.jpg",
        4: "gone.jpg",
        5: "gone.jpg",
        6: "gone.jpg",
        7: "gone.jpg",
        9: f"{tmp_path}/half.jpg",
    }
    files = [broken.get(number, name) for number, name in enumerate(names)]
    found = read_all(recipe_of(PictureList(names, files, (str(photo_folder),))), 12, batch=4, **readers)
    assert [one[0] for one in found] == names
    assert {row for row, one in enumerate(found) if one[3]} == broken.keys()
    for row, (one, other) in enumerate(zip(found, expected, strict=True)):
        if row in broken:
            assert not one[1].any()
            assert one[2] == (0, 0)
        else:
            assert np.array_equal(one[1], other[1])
            assert one[2] == other[2]


@pytest.mark.parametrize("readers", READERS)
def test_pictures_that_are_all_broken_are_all_told(tmp_path, readers):
    names = [f"{number}.jpg" for number in range(5)]
    rows = read_all(recipe_of(PictureList(names, names, (str(tmp_path),))), 5, batch=2, **readers)
    assert [row[3] for row in rows] == [f"'{name}': No such file or directory" for name in names]


def test_files_give_the_pixels_that_the_data_set_packed_from_them_gives(photo_dataset, photo_folder):
    dataset = read_dataset(photo_dataset)
    recipe = Recipe(Folder(photo_dataset), dataset, "val", CROP, seed=0, unlabelled=True)
    packed = read_all(recipe, dataset.split("val").samples)
    by_stem = {
        path.relative_to(photo_folder).with_suffix("").as_posix(): path for path in photo_folder.rglob("*.*")
    }
    files = [str(by_stem[key]) for key, *_ in packed]
    loose = read_all(recipe_of(PictureList(files, files, ("",))), len(files))
    assert len(packed) == 12
    for one, other, file in zip(packed, loose, files, strict=True):
        assert np.array_equal(one[1], other[1])
        with Image.open(file) as picture:
            assert one[2] == other[2] == picture.size[::-1]


def test_a_data_set_with_masks_is_read_without_them(segmentation_dataset):
    dataset = read_dataset(segmentation_dataset)
    recipe = Recipe(Folder(segmentation_dataset), dataset, "val", CROP, seed=0, unlabelled=True)
    rows = read_all(recipe, 6)
    assert [row[1].shape for row in rows] == [(24, 24, 3)] * 6
    labelled = replace(recipe, unlabelled=False)
    (batch,) = stream(
        labelled, lambda: evaluation_work(6, batch=6, process=0, processes=1), workers=0, prefetch=1
    )
    assert batch.targets.shape == (6, 24, 24)
    assert [row[0] for row in rows] == batch.keys


def test_the_sizes_are_those_of_the_pictures_before_they_were_decoded_small(photographs, tmp_path):
    image = np.tile(photographs["coffee"], (2, 2, 1))
    Image.fromarray(image).save(tmp_path / "large.jpg")
    Image.fromarray(image[:100, :50]).save(tmp_path / "small.png")
    rows = read_all(recipe_of(find_pictures(tmp_path)), 2)
    assert [row[2] for row in rows] == [(800, 1200), (100, 50)]


def test_a_turned_photograph_has_the_size_that_it_is_seen_in(photographs, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photographs["cat"]).save(tmp_path / "a.jpg", exif=exif)
    ((_, _, size, _),) = read_all(recipe_of(find_pictures(tmp_path)), 1)
    assert size == photographs["cat"].shape[1::-1]
    assert decode(FileReader(find_pictures(tmp_path)).read(0).image, mode="RGB").shape[:2] == size


BORDERS = st.lists(
    st.one_of(
        st.tuples(st.just("pad"), st.fixed_dictionaries({"padding": st.integers(0, 9)})),
        st.tuples(st.just("invert"), st.just({"probability": 0.0})),
    ),
    max_size=3,
)


@given(height=st.integers(1, 40), width=st.integers(1, 40), borders=BORDERS, size=st.integers(0, 100))
def test_the_way_back_from_borders_ends_at_the_very_picture(height, width, borders, size):
    image = np.arange(1, height * width + 1, dtype=np.int64).reshape(height, width, 1).astype(np.uint8)
    largest = max(height, width) + 18 * 3
    transforms = [*borders, *([("center_crop", {"size": largest + size})] if size else [])]
    draws = np.random.default_rng(0)
    pixels = Pixels(image)
    for name, parameters in transforms:
        pixels = TRANSFORMS[name](pixels, draws, **parameters)
    seen = pixels.image
    for step in way_back(transforms, Size(height, width)):
        assert step.kept == step.size
        seen = seen[step.top : step.top + step.kept.height, step.left : step.left + step.kept.width]
    assert np.array_equal(seen, image)


@given(height=st.integers(2, 60), width=st.integers(2, 60), to=st.integers(2, 60))
def test_the_way_back_from_scaling_goes_through_the_same_sizes(height, width, to):
    transforms = [("resize", {"size": to}), ("pad", {"padding": 3}), ("resize_to", {"height": 9, "width": 7})]
    steps = way_back(transforms, Size(height, width))
    if steps:
        assert steps[-1].size == (height, width)
    image = np.zeros((height, width, 1), np.uint8)
    pixels, sizes = Pixels(image), [(height, width)]
    for name, parameters in transforms:
        pixels = TRANSFORMS[name](pixels, np.random.default_rng(0), **parameters)
        sizes.append(pixels.image.shape[:2])
    assert [step.size for step in steps[::-1]] == [
        before for before, after in pairwise(sizes) if before != after
    ]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("center_crop", {"size": 30}),
        ("center_crop", {"size": 45}),
        ("resized_center_crop", {"size": 28, "shorter": 32}),
        ("resized_center_crop", {"size": 32, "shorter": 32}),
        ("random_resized_crop", {"size": 32}),
        ("horizontal_flip", {}),
        ("quarter_turn", {}),
        ("elastic", {}),
    ],
)
def test_what_cuts_pixels_off_has_no_way_back(name, parameters):
    with pytest.raises(UserError, match=rf"data.eval_transforms: {name}") as caught:
        way_back([("invert", {}), (name, parameters)], Size(40, 50))
    assert caught.value.code == "CONFIG"
    assert "resize_to" in caught.value.mend


def test_a_crop_of_the_whole_picture_cuts_nothing_off():
    assert way_back([("center_crop", {"size": 40})], Size(40, 40)) == []
    assert way_back([("resized_center_crop", {"size": 32, "shorter": 32})], Size(40, 40)) == [
        (0, 0, (32, 32), (40, 40))
    ]


def test_what_fixes_the_size_is_known():
    assert fixes_size([("resize_to", {"height": 8, "width": 8}), ("invert", {})])
    assert not fixes_size([("resize", {"size": 8}), ("pad", {"padding": 1})])


def test_an_empty_file_says_so_briefly(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    (row,) = read_all(recipe_of(find_pictures(tmp_path)), 1)
    assert row[3].startswith("'a.jpg': ")
    assert io.StringIO(row[3]).readlines() == [row[3]]
