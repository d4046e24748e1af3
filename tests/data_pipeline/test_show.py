import io
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from data_pipeline.fault import UserError
from data_pipeline.grid import SIDE, Grid, Thumbnail, draw_grid, fitted, font, legend_lines, shrunk
from data_pipeline.index import DatasetIndex, Shard, Split, index_path, read_dataset
from data_pipeline.items import SourceOptions
from data_pipeline.masks import class_table as mask_table
from data_pipeline.masks import mask_classes, read_mask
from data_pipeline.overlay import COLOURS, IGNORED_COLOUR, SHARE, class_colours, laid_over
from data_pipeline.pack import pack
from data_pipeline.read import ShardReader
from data_pipeline.shard_index import read_shard_index
from data_pipeline.show import (
    balanced,
    columns_for,
    labels_in_words,
    legend_of,
    read_thumbnails,
    shares_in_words,
    write_grid,
)
from data_pipeline.show_table import CLASS_ROWS, class_table, facts
from data_pipeline.sources import find_source
from data_pipeline.spread import spread
from data_pipeline.store import Folder, load_dataset


def many_classes(count, name="class {}"):
    classes = tuple(name.format(number) for number in range(count))
    shard = Shard("train-000000.tar", 2 * count, 1_500_000, "", "")
    splits = {"train": Split((shard,), (2,) * count, ""), "val": Split((shard, shard), (1,) * count, "")}
    return DatasetIndex("multiclass", classes, "L", (0.5,), (0.25,), splits)


def printed(dataset, width=100):
    console = Console(file=io.StringIO(), width=width, markup=False)
    console.print(class_table(dataset))
    return console.file.getvalue()


@given(st.integers(0, 500), st.integers(1, 100))
def test_a_spread_is_even_and_within_the_split(total, count):
    numbers = spread(total, count)
    assert len(numbers) == min(total, count)
    assert set(numbers.tolist()) <= set(range(total))
    steps = np.diff(numbers)
    assert len(steps) == 0 or (steps.min() >= 1 and np.ptp(steps) <= 1)


@given(st.lists(st.integers(0, 8), max_size=60), st.integers(1, 30))
def test_rows_are_taken_from_all_classes_alike(labels, count):
    rows = balanced(np.array(labels, np.int64), count)
    assert len(set(rows.tolist())) == len(rows) == min(count, len(labels))
    taken = [sum(labels[row] == label for row in rows) for label in set(labels)]
    there = [labels.count(label) for label in set(labels)]
    assert all(
        one >= other - 1 or one == most for one, most in zip(taken, there, strict=True) for other in taken
    )


def test_rows_come_in_rounds_of_the_classes():
    labels = np.array([2, 0, 0, 1, 2, 1, 0])
    assert labels[balanced(labels, 6)].tolist() == [0, 1, 2, 0, 1, 2]


def test_of_more_classes_than_cells_every_so_many_are_shown():
    labels = np.repeat(np.arange(1000), 2)
    assert labels[balanced(labels, 4)].tolist() == [0, 250, 500, 750]


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_rows_hold_whole_rounds_of_few_classes(count, classes):
    columns = columns_for(count, min(classes, count))
    assert 1 <= columns <= count
    assert columns <= max(12, np.ceil(np.sqrt(1.6 * count)))
    assert classes > 12 or columns in (count, columns // classes * classes) or classes > count


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (32, 32), (41, 40), (3000, 2000), (100, 150)])
@pytest.mark.parametrize("channels", [1, 3])
def test_thumbnails_of_any_picture_fit_their_cell(shape, channels):
    picture = shrunk(np.full((*shape, channels), 200, np.uint8))
    assert max(picture.size) <= SIDE
    assert max(picture.size) > SIDE * 0.75
    assert min(picture.size) >= 1
    assert picture.getextrema() == ((200, 200),) * 3


def test_tiny_pictures_keep_their_pixels():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    picture = np.asarray(shrunk(image))
    assert np.array_equal(picture[::20, ::20], image)
    assert np.array_equal(picture[19::20, 19::20], image)


def test_the_grid_shows_each_thumbnail_above_its_caption():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    cells = [Thumbnail(Image.new("RGB", (SIDE, SIDE), colour), "name") for colour in colours]
    grid = np.asarray(draw_grid(Grid("data", "train", 2, []), cells))
    places = [np.argwhere((grid == colour).all(axis=2)) for colour in colours]
    assert [len(place) for place in places] == [SIDE * SIDE] * 3
    (top, left), (other_top, _), (third_top, third_left) = (place.min(axis=0) for place in places)
    assert top == other_top < third_top
    assert left == third_left
    assert (grid[top + SIDE + 2 : third_top - 2, left : left + SIDE] < 100).any()
    assert (grid[:10] == 255).all()
    assert (grid[:, -10:] == 255).all()


@given(st.text(max_size=300))
def test_captions_fit_whatever_the_name(name):
    small = font("DejaVuSans.ttf", 13)
    caption = fitted(name, small, SIDE)
    assert small.getlength(caption) <= SIDE
    assert "\n" not in caption


def test_long_names_keep_their_start_and_their_end():
    name = "pneumonia_of_the_left_upper_lobe_without_effusion"
    caption = fitted(name, font("DejaVuSans.ttf", 13), SIDE)
    start, end = caption.split("…")
    assert name.startswith(start)
    assert name.endswith(end)
    assert min(len(start), len(end)) >= 6


def test_the_thumbnails_are_the_pictures_of_their_class(photo_dataset, photo_folder):
    thumbnails = read_thumbnails(load_dataset(photo_dataset), split="val", samples=12)
    assert [one.caption for one in thumbnails] == ["astronaut", "cat", "coffee"] * 4
    for picture, name, _ in thumbnails:
        candidates = [np.asarray(Image.open(path)) for path in (photo_folder / name).iterdir()]
        same = [np.array_equal(np.asarray(picture), np.asarray(shrunk(one))) for one in candidates]
        assert same.count(True) == 1


def test_a_grid_of_one_grey_sample_is_drawn(tmp_path):
    (tmp_path / "source" / "only").mkdir(parents=True)
    Image.new("L", (1, 500), 90).save(tmp_path / "source" / "only" / "a.png")
    source = find_source(tmp_path / "source", SourceOptions())
    root = tmp_path / "root"
    pack(source, root, workers=1, seed=0, shard_samples=9, shard_bytes=9**9)
    write_grid(load_dataset(root), split="train", samples=40, out=tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert (grid == 90).all(axis=2).sum() == SIDE


def test_the_same_grid_is_drawn_again(photo_dataset, tmp_path):
    for name in ("a.png", "b.png"):
        write_grid(load_dataset(photo_dataset), split="train", samples=9, out=tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("out", ["missing/grid.png", "."])
def test_a_place_that_cannot_be_written_is_an_error_that_names_it(photo_dataset, tmp_path, out):
    with pytest.raises(UserError, match="cannot write") as caught:
        write_grid(load_dataset(photo_dataset), split="train", samples=1, out=tmp_path / out)
    assert caught.value.code == "USAGE"
    assert "--out" in caught.value.mend
    assert str(tmp_path / out) in caught.value.what


def test_a_damaged_sample_is_named_instead_of_drawn(photo_dataset, tmp_path):
    root = shutil.copytree(photo_dataset, tmp_path / "copy")
    tar = root / "val-000000.tar"
    data = bytearray(tar.read_bytes())
    shard = read_dataset(root).split("val").shards[0]
    data[int(read_shard_index(index_path(tar), shard).offset[0].max())] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match=r"val-000000\.tar"):
        read_thumbnails(load_dataset(root), split="val", samples=12)


def test_the_table_counts_classes_and_splits(photo_dataset):
    words = [line.split() for line in printed(read_dataset(photo_dataset)).splitlines() if line.strip()]
    assert words[0] == ["class", "train", "val", "total"]
    assert words[2:] == [
        ["astronaut", "16", "4", "20"],
        ["cat", "16", "4", "20"],
        ["coffee", "16", "4", "20"],
        ["total", "48", "12", "60"],
    ]


def test_of_very_many_classes_the_first_are_listed_and_the_others_summed():
    lines = [line for line in printed(many_classes(1000)).splitlines() if line.strip()]
    assert len(lines) == CLASS_ROWS + 4
    assert lines[-2].split() == ["...", "and", "970", "more", "classes", "1,940", "970", "2,910"]
    assert lines[-1].split() == ["total", "2,000", "1,000", "3,000"]


@pytest.mark.parametrize("name", ["[red]{}[/red] :smile:", "x" * 300 + "{}", "line\nbreak {}"])
def test_odd_class_names_neither_style_nor_break_the_table(name):
    text = printed(many_classes(2, name), width=80)
    assert len([line for line in text.splitlines() if line.strip()]) == 5
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "train" in text
    assert name.format(0)[:9].replace("\n", " ") in text


def test_the_facts_tell_mode_statistics_shards_and_bytes():
    assert facts(many_classes(1)) == [
        "pictures: grey (L), mean 0.500, std 0.250",
        "train: 2 samples in 1 shard, 1.5 MB",
        "val: 4 samples in 2 shards, 3.0 MB",
    ]


def raw_samples(root, split):
    dataset = read_dataset(root)
    reader = ShardReader(Folder(root), dataset, split)
    found = reader.read_many(np.arange(dataset.split(split).samples))
    reader.close()
    return found


def test_captions_of_labels_name_those_that_are_there_and_those_that_are_missing():
    names = ("bright", "wide", "red")
    assert labels_in_words([1, 0, 1], names) == ("bright, red", "")
    assert labels_in_words([0, 0, 0], names) == ("none", "")
    assert labels_in_words([-1, 0, 1], names) == ("red", "missing: bright")
    assert labels_in_words([-1, -1, -1], names) == ("none", "missing: 3 of 3")


def test_thumbnails_of_labels_tell_what_was_packed(multilabel_dataset):
    dataset = read_dataset(multilabel_dataset)
    thumbnails = read_thumbnails(load_dataset(multilabel_dataset), split="val", samples=15)
    expected = sorted(
        labels_in_words(raw.label, dataset.classes) for raw in raw_samples(multilabel_dataset, "val")
    )
    assert sorted((one.caption, one.note) for one in thumbnails) == expected
    assert any(one.note for one in thumbnails)


def test_few_thumbnails_show_every_label(multilabel_dataset):
    dataset = read_dataset(multilabel_dataset)
    thumbnails = read_thumbnails(load_dataset(multilabel_dataset), split="train", samples=4)
    shown = {name for one in thumbnails for name in one.caption.split(", ")}
    assert shown >= set(dataset.classes)


def test_a_mask_lies_over_its_picture_where_it_is():
    picture = Image.new("RGB", (8, 6), (100, 100, 100))
    classes = np.zeros((6, 8), np.uint8)
    classes[1:5, 2:7] = 1
    classes[0, 0] = 255
    colour = COLOURS[0]
    pixels = np.asarray(laid_over(picture, classes, {1: colour})).astype(int)
    assert (pixels[classes == 0] == 100).all()
    assert pixels[0, 0].tolist() == list(IGNORED_COLOUR)
    assert (pixels[2:4, 3:6] == [round(100 + (one - 100) * SHARE) for one in colour]).all()
    for edge in (pixels[1, 2:7], pixels[4, 2:7], pixels[1:5, 2], pixels[1:5, 6]):
        assert (edge == colour).all()


def test_a_background_is_left_clear_and_every_other_class_has_a_colour():
    dataset = many_classes(4)
    for first, start in (("background", 1), ("Background", 1), ("0", 1), ("road", 0)):
        named = replace(
            dataset, task="segmentation", classes=(first, "a", "b", "c"), mask_values=(0, 1, 2, 3)
        )
        colours = class_colours(named)
        assert list(colours) == list(range(start, 4))
        assert len(set(colours.values())) == len(colours)
        legend = legend_of(named, ignored=True)
        assert [name for name, _ in legend] == [*named.classes[start:], "of no class"]
    assert legend_of(dataset, ignored=False) == []


def test_a_legend_of_very_many_classes_stays_short_and_in_its_lines():
    dataset = replace(
        many_classes(200, "a rather long name {}"), task="segmentation", mask_values=tuple(range(200))
    )
    legend = legend_of(dataset, ignored=False)
    assert len(legend) == 13
    assert legend[-1] == ("and 188 more", None)
    lines = legend_lines(legend, 500)
    assert [entry for line in lines for entry in line] == legend
    assert 2 <= len(lines) <= 7
    draw_grid(Grid("data", "train", 1, legend), [Thumbnail(Image.new("RGB", (9, 9)), "x")])


def test_shares_leave_out_the_first_class_unless_it_is_all_there_is():
    classes = np.zeros((10, 20), np.uint8)
    names = ("background", "cell", "edge")
    assert shares_in_words(classes, names) == ("background: 100%", "")
    classes[:5] = 1
    classes[9, 0] = 2
    assert shares_in_words(classes, names) == ("cell: 50%, edge: <1%", "")
    classes[8, :] = 255
    assert shares_in_words(classes, names) == ("cell: 50%, edge: <1%", "of no class: 10%")


def test_thumbnails_of_masks_are_coloured_where_the_mask_is(segmentation_dataset):
    dataset = read_dataset(segmentation_dataset)
    thumbnails = read_thumbnails(load_dataset(segmentation_dataset), split="val", samples=9)
    raws = raw_samples(segmentation_dataset, "val")
    assert len(thumbnails) == len(raws) == 6
    for thumbnail, raw in zip(thumbnails, raws, strict=True):
        share = (mask_classes(read_mask(raw.mask), mask_table(dataset.mask_values)) == 1).mean()
        assert thumbnail.caption == f"foreground: {share:.0%}" if share >= 0.01 else True
        blue = (np.asarray(thumbnail.picture) == COLOURS[0]).all(axis=2)
        assert blue.any() == (0 < share < 1)


def test_a_damaged_mask_is_named_instead_of_drawn(segmentation_dataset, tmp_path):
    root = shutil.copytree(segmentation_dataset, tmp_path / "copy")
    shard = read_dataset(root).split("val").shards[0]
    index = read_shard_index(index_path(root / shard.name), shard)
    data = bytearray((root / shard.name).read_bytes())
    data[int(index.offset[2, index.extensions.index("mask.png")]) + 20] ^= 1
    (root / shard.name).write_bytes(data)
    with pytest.raises(UserError, match=index.key(2)):
        read_thumbnails(load_dataset(root), split="val", samples=12)


@pytest.mark.parametrize("name", ["multilabel_dataset", "segmentation_dataset"])
def test_grids_of_every_task_are_drawn_alike_twice(name, request, tmp_path):
    root = request.getfixturevalue(name)
    for out in ("a.png", "b.png"):
        write_grid(load_dataset(root), split="train", samples=9, out=tmp_path / out)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_table_of_labels_counts_ones_and_samples(multilabel_dataset):
    dataset = read_dataset(multilabel_dataset)
    lines = [line.split() for line in printed(dataset).splitlines() if line.strip()]
    train = np.array([raw.label for raw in raw_samples(multilabel_dataset, "train")])
    val = np.array([raw.label for raw in raw_samples(multilabel_dataset, "val")])
    ones = np.stack([(train == 1).sum(axis=0), (val == 1).sum(axis=0)], axis=1)
    rows = {words[0]: [int(one) for one in words[1:]] for words in lines[2:]}
    assert rows == {
        **{name: [*row, sum(row)] for name, row in zip(dataset.classes, ones.tolist(), strict=True)},
        "samples": [45, 15, 60],
    }


def test_the_table_of_masks_is_in_percent_of_the_pixels(segmentation_dataset):
    dataset = read_dataset(segmentation_dataset)
    lines = [line.split() for line in printed(dataset).splitlines() if line.strip()]
    pixels = [np.array(split.class_counts) for split in dataset.splits.values()]
    shares = [counts / counts.sum() for counts in (*pixels, sum(pixels))]
    assert lines[2] == ["background", *(f"{share[0]:.2%}" for share in shares)]
    assert lines[3] == ["foreground", *(f"{share[1]:.2%}" for share in shares)]
    assert lines[4] == ["samples", "18", "6", "24"]
    assert "masks: the values 0, 255 are the classes" in facts(dataset)


def test_a_table_of_masks_without_a_pixel_is_no_division_by_nothing():
    shard = Shard("a.tar", 1, 1, "", "")
    dataset = replace(
        many_classes(2), task="segmentation", mask_values=(0, 1), splits={"val": Split((shard,), (0, 0), "")}
    )
    assert "0.00%" in printed(dataset)
