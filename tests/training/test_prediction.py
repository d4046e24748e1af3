"""`predict`: a row for each picture, in order, the same file on any number of processes."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.fault import UserError
from data_pipeline.index import read_dataset
from training.command import read_request
from training.config.loss import LossTerms
from training.losses import Labels
from training.prediction import Predictor, predict
from training.prediction.mask_names import OVERLAYS, mask_names, mask_of
from training.prediction.rows import Column, distinct
from training.prediction.table import TABLE_FORMATS
from training.tasks import make_task

CLASSES = ("cat", "dog, or not", "=owl")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
CROP = (("resized_center_crop", {"size": 24, "shorter": 28}),)


def task_of(kind, classes, outputs):
    loss = "bce" if outputs == 1 or kind == "multilabel" else "cross_entropy"
    labels = Labels(kind, classes, outputs, (1,) * classes, (1,) * classes)
    return make_task(labels, LossTerms.model_validate(loss))


def classifier_of(kind="multiclass", classes=CLASSES, *, seed=0, **how):
    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2)),
        *(torch.nn.Flatten(), torch.nn.Linear(32, len(classes))),
    )
    task = task_of(kind, len(classes), len(classes))
    fixed = {"image_mode": "RGB", "mean": MEAN, "std": STD, "transforms": CROP, **how}
    return Predictor(Path("best.safetensors"), kind, network, task, classes, **fixed)


def segmenter_of(outputs=1, classes=("background", "cell"), *, values=(0, 255), seed=0, **how):
    torch.manual_seed(seed)
    network = torch.nn.Conv2d(3, outputs, 5, padding=2)
    task = task_of("segmentation", len(classes), outputs)
    fixed = {"image_mode": "RGB", "mean": MEAN, "std": STD, "transforms": (), "mask_values": values, **how}
    return Predictor(Path("best.safetensors"), "segmentation", network, task, classes, **fixed)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def predicted(accelerator, tmp_path):
    """`predicted(saved, source, **options)`: the path that was written."""

    def call(saved, source, *, out="out.csv", **options):
        words = [f"--predict.{name.replace('_', '-')}={value}" for name, value in options.items()]
        words += ["--data.workers", "0", "--eval.batch", "7", "--quiet", "--run-dir", str(tmp_path / "run")]
        request = read_request(
            ["predict", f"--predict.source={source}", f"--predict.out={tmp_path / out}", *words]
        )
        predict(request, accelerator, saved)
        return tmp_path / out

    return call


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def logits_by_hand(saved, picture, *, size=None):
    """One picture through the network alone: Pillow, no pipeline; `size` is that of the network's input."""
    with Image.open(picture) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float()[None]
    if size:
        image = torch.nn.functional.interpolate(image, size=size)
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) * 255 for one in (MEAN, STD))
    with torch.inference_mode():
        return saved.network((image - mean) / std)[0]


@pytest.fixture
def squares(photographs, tmp_path):
    """PNGs of one size, which no transform need touch."""
    folder = tmp_path / "squares"
    folder.mkdir()
    for number in range(10):
        name = ("cat", "coffee", "flower")[number % 3]
        Image.fromarray(photographs[name][number * 9 :][:32, :32]).save(folder / f"{number}.png")
    return folder


def test_the_scores_are_those_of_the_bare_network_on_each_picture(predicted, squares):
    saved = classifier_of(transforms=())
    rows = rows_of(predicted(saved, squares))
    assert list(rows[0]) == ["sample", "prediction", "score", *CLASSES, "error"]
    assert [row["sample"] for row in rows] == [f"{number}.png" for number in range(10)]
    for row in rows:
        expected = logits_by_hand(saved, squares / row["sample"]).softmax(dim=0).numpy()
        scores = np.array([float(row[name]) for name in CLASSES], np.float32)
        np.testing.assert_allclose(scores, expected, rtol=1e-5)
        assert row["prediction"] == CLASSES[expected.argmax()]
        assert np.float32(row["score"]) == scores.max()
        assert row["error"] == ""


def test_logits_instead_of_probabilities_leave_the_decisions_as_they_are(predicted, squares):
    saved = classifier_of("multilabel", transforms=())
    probabilities = rows_of(predicted(saved, squares, threshold=0.45))
    logits = rows_of(predicted(saved, squares, threshold=0.45, scores="logits"))
    found = [f"{name}_found" for name in CLASSES]
    assert list(logits[0]) == ["sample", *CLASSES, *found, "error"]
    seen = set()
    for one, other in zip(probabilities, logits, strict=True):
        for name in CLASSES:
            value = torch.tensor(float(other[name])).sigmoid()
            assert float(one[name]) == pytest.approx(float(value), rel=1e-5)
            assert other[f"{name}_found"] == one[f"{name}_found"] == str(int(float(one[name]) >= 0.45))
            seen.add(one[f"{name}_found"])
    assert seen == {"0", "1"}


@pytest.mark.parametrize("options", [{}, {"threshold": 0.9}])
def test_thresholds_are_the_given_one_else_those_of_the_weights_else_a_half(predicted, squares, options):
    saved = classifier_of("multilabel", transforms=())
    halves = rows_of(predicted(saved, squares))
    assert all(
        row[f"{name}_found"] == str(int(float(row[name]) >= 0.5)) for row in halves for name in CLASSES
    )
    # At its own score a label is found, a hair above it is not.
    scores = [np.float32(halves[4][name]) for name in CLASSES]
    limits = (float(scores[0]), float(np.nextafter(scores[1], np.float32(1))), float(scores[2]))
    rows = rows_of(predicted(replace(saved, thresholds=limits), squares, **options))
    expected = ["0"] * 3 if options else ["1", "0", "1"]
    assert [rows[4][f"{name}_found"] for name in CLASSES] == expected


def test_the_k_likeliest_classes_come_in_their_order(predicted, squares):
    saved = classifier_of(transforms=())
    rows, whole = rows_of(predicted(saved, squares, top_k=2)), rows_of(predicted(saved, squares))
    assert list(rows[0]) == ["sample", "prediction", "score", "top2", "top2_score", "error"]
    for row, one in zip(rows, whole, strict=True):
        order = sorted(CLASSES, key=lambda name, one=one: -float(one[name]))
        assert [row["prediction"], row["top2"]] == order[:2]
        assert [row["score"], row["top2_score"]] == [one[order[0]], one[order[1]]]


@pytest.mark.parametrize("views", ["horizontal", "flips"])
@pytest.mark.parametrize("scores", ["probabilities", "logits"])
def test_mirror_images_are_averaged(predicted, squares, views, scores, tmp_path):
    saved = classifier_of(transforms=())
    single = partial(predicted, saved, scores=scores)
    mirrors = [(), (1,), (0,), (0, 1)][: 2 if views == "horizontal" else 4]
    alone = []
    for number, axes in enumerate(mirrors):
        mirrored = tmp_path / f"mirror{number}"
        mirrored.mkdir()
        for path in squares.iterdir():
            with Image.open(path) as picture:
                Image.fromarray(np.flip(np.asarray(picture), axes)).save(mirrored / path.name)
        alone.append(rows_of(single(mirrored, out=f"{number}.csv")))
    together = rows_of(single(squares, tta=views))
    for number, row in enumerate(together):
        for name in CLASSES:
            mean = np.mean([float(one[number][name]) for one in alone])
            assert float(row[name]) == pytest.approx(mean, rel=1e-5, abs=1e-7)


def broken_list(photo_folder, folder):
    """A list of pictures, some broken, some twice, in no order."""
    (folder / "half.jpg").write_bytes((photo_folder / "cat" / "01.jpg").read_bytes()[:400])
    (folder / "empty.png").write_bytes(b"")
    names = [
        f"{photo_folder}/{label}/{number:02d}.jpg" for label in ("coffee", "cat") for number in range(11, 15)
    ]
    names = ["gone.jpg", names[3], "half.jpg", *names, names[3], "empty.png", *["gone.jpg"] * 7, names[0]]
    (folder / "list.txt").write_text("\n".join(names))
    return names


def test_a_list_keeps_its_order_and_broken_pictures_are_rows_with_their_error(
    predicted, photo_folder, tmp_path
):
    names = broken_list(photo_folder, tmp_path)
    rows = rows_of(predicted(classifier_of(), tmp_path / "list.txt"))
    assert [row["sample"] for row in rows] == names
    assert rows[1] == rows[6] == rows[11]
    for row in rows:
        is_broken = row["sample"] in ("gone.jpg", "half.jpg", "empty.png")
        assert bool(row["error"]) == is_broken
        assert bool(row["prediction"]) == bool(row["score"]) == (not is_broken)
    assert rows[0]["error"] == "'gone.jpg': No such file or directory"
    assert "cannot decode" in rows[2]["error"]
    # Alone it is what it is beside broken ones.
    (alone,) = rows_of(predicted(classifier_of(), names[1], out="alone.csv"))
    assert float(alone["score"]) == pytest.approx(float(rows[1]["score"]), rel=1e-5)


def test_a_data_set_is_predicted_in_the_order_of_its_split(predicted, photo_dataset, photo_folder):
    rows = rows_of(predicted(classifier_of(), photo_dataset, split="train"))
    assert len(rows) == read_dataset(photo_dataset).split("train").samples == 48
    assert len({row["sample"] for row in rows}) == 48
    loose = {
        row["sample"].rpartition(".")[0]: row for row in rows_of(predicted(classifier_of(), photo_folder))
    }
    for row in rows:
        assert float(row["score"]) == pytest.approx(float(loose[row["sample"]]["score"]), rel=1e-5)
        assert row["prediction"] == loose[row["sample"]]["prediction"]


HOSTILE = (
    *("a,b.png", 'quo"te.png', "new\nline.png", "re\rturn.png", "=1+1.png", "🦉.png", " led.png", "-x.png"),
    *("semi;colon.png", "tab\t.png", "'.png", "#.png", "%s.png", "\u202etxt.png"),
)


@pytest.mark.parametrize("suffix", sorted(TABLE_FORMATS))
def test_hostile_names_and_every_float32_survive_the_round_trip(predicted, squares, tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in HOSTILE:
        shutil.copyfile(squares / "0.png", folder / name)
    (folder / "empty,\n.png").write_bytes(b"")
    saved = classifier_of(transforms=(), classes=("error", "a\r\nb", "sample"))
    path = predicted(saved, folder, out=f"out{suffix}", scores="logits")
    if suffix == ".csv":
        rows = [{name: value or None for name, value in row.items()} for row in rows_of(path)]
    elif suffix == ".jsonl":
        rows = list(map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1]))
    else:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    columns = ["sample", "prediction", "score", "error~2", "a\r\nb", "sample~2", "error"]
    assert all(list(row) == columns for row in rows)
    assert [row["sample"] for row in rows] == sorted([*HOSTILE, "empty,\n.png"])
    expected = logits_by_hand(saved, squares / "0.png")
    for row in rows:
        if row["sample"] == "empty,\n.png":
            assert [row[name] for name in columns[1:-1]] == [None] * 5
            assert "cannot" in row["error"]
        else:
            assert row["error"] is None
            scores = [np.float32(row[name]) for name in columns[3:6]]
            np.testing.assert_allclose(scores, expected, rtol=1e-5)
            # The very float32: what was written is the shortest text of it.
            assert suffix != ".csv" or [row[name] for name in columns[3:6]] == [str(one) for one in scores]


ROWS = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9),
        st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.none() | st.integers(0, 1),
    ),
    max_size=30,
)


@pytest.mark.parametrize("suffix", sorted(TABLE_FORMATS))
@given(rows=ROWS, cuts=st.lists(st.integers(0, 30), max_size=4), portion=st.integers(1, 9))
def test_a_joined_table_does_not_depend_on_its_parts(tmp_path_factory, suffix, rows, cuts, portion):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    folder, form = tmp_path_factory.mktemp("parts"), TABLE_FORMATS[suffix]
    columns = [Column("sample", "text"), Column("number", "number"), Column("flag", "flag")]
    bounds = [0, *sorted(cuts), max(30, len(rows))]
    paths = [folder / f"part{number}" for number in range(len(bounds))]
    for path, first, last in zip(paths[1:], bounds, bounds[1:], strict=False):
        part, mine = form.part(path, columns), rows[first:last]
        for start in range(0, len(mine), portion):
            part.write(mine[start : start + portion])
        part.close()
    whole = form.part(paths[0], columns)
    whole.write(rows)
    whole.close()
    form.join(paths[1:], columns, folder / "joined")
    form.join(paths[:1], columns, folder / "whole")
    assert (folder / "joined").read_bytes() == (folder / "whole").read_bytes()


def test_names_of_columns_make_way_for_one_another():
    assert distinct(["a", "b", "a", "a~2", "a"]) == ["a", "b", "a~2", "a~2~2", "a~3"]


def masks_of(folder):
    found = {}
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as mask:
            found[path.relative_to(folder).as_posix()] = (mask.mode, np.asarray(mask))
    return found


def test_masks_have_the_size_of_their_pictures_and_the_values_of_the_data_set(predicted, mask_folder):
    saved = segmenter_of()
    folder = predicted(saved, mask_folder / "images", out="masks")
    rows = {row["sample"]: row for row in rows_of(folder / "predictions.csv")}
    masks = masks_of(folder)
    pictures = sorted((mask_folder / "images").iterdir())
    assert len(pictures) == len(rows) == 24
    assert masks.keys() == {f"{at}{path.stem}.png" for path in pictures for at in ("", f"{OVERLAYS}/")}
    shares = []
    for path in pictures:
        mode, mask = masks[f"{path.stem}.png"]
        expected = logits_by_hand(saved, path)[0].numpy()
        certain = np.abs(expected) > 0.01  # Pillow decodes a JPEG as another rounding than ours
        assert mode == "L"
        assert mask.shape == expected.shape
        assert (((mask == 255) == (expected > 0)) | ~certain | (path.suffix == ".jpg")).all()
        assert ((mask == 255) == (expected > 0)).mean() > 0.98
        assert set(np.unique(mask)) <= {0, 255}
        row = rows[path.name]
        assert (row["mask"], row["error"]) == (f"{path.stem}.png", "")
        assert np.float32(row["cell"]) == np.float32((mask == 255).mean())
        shares.append(float(row["cell"]))
        overlay = masks[f"{OVERLAYS}/{path.stem}.png"]
        assert (overlay[0], overlay[1].shape) == ("RGB", (*mask.shape, 3))
    assert 0 < np.mean(shares) < 1


def test_masks_of_scaled_pictures_are_scaled_back_before_the_decision(predicted, squares):
    to = (("resize_to", {"height": 16, "width": 20}),)
    saved = segmenter_of(3, ("a", "b", "c"), values=(7, 9, 200), transforms=to)
    masks = masks_of(predicted(saved, squares, out="masks", overlay=False))
    assert masks.keys() == {f"{number}.png" for number in range(10)}
    seen = set()
    for name, (_, mask) in masks.items():
        with Image.open(squares / name) as picture:
            small = picture.resize((20, 16), Image.Resampling.BILINEAR)
        mean, std = (torch.tensor(one).view(3, 1, 1) * 255 for one in (MEAN, STD))
        image = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float()
        with torch.inference_mode():
            probabilities = saved.network(((image - mean) / std)[None]).softmax(dim=1)
        scaled = torch.nn.functional.interpolate(probabilities, size=(32, 32), mode="bilinear")[0]
        expected = np.array([7, 9, 200])[scaled.argmax(dim=0).numpy()]
        assert mask.shape == (32, 32)
        assert (mask == expected).mean() > 0.97  # ours and Pillow's scaling differ by a level
        seen |= set(np.unique(mask))
    assert seen <= {7, 9, 200}
    assert len(seen) > 1


def test_borders_are_cut_off_and_mirrors_turned_back(predicted, squares):
    """A network that looks at single pixels cares for neither."""
    torch.manual_seed(1)
    plain = segmenter_of(2)
    plain = replace(plain, network=torch.nn.Conv2d(3, 2, 1))
    bordered = replace(plain, transforms=(("pad", {"padding": 5, "fill": 0, "mask_fill": 255}),))
    expected = masks_of(predicted(plain, squares, out="plain"))
    assert {len(np.unique(mask)) for _, mask in expected.values()} >= {2}
    for saved, options in ((bordered, {}), (plain, {"tta": "flips"}), (bordered, {"tta": "horizontal"})):
        found = masks_of(predicted(saved, squares, out="other", **options))
        assert all(np.array_equal(found[name][1], mask) for name, (_, mask) in expected.items())
        assert found.keys() == expected.keys()


def test_a_threshold_moves_the_border_of_a_single_output(predicted, squares):
    saved = segmenter_of()
    shares = [
        np.mean(
            [
                float(row["cell"])
                for row in rows_of(predicted(saved, squares, out="m", **how) / "predictions.csv")
            ]
        )
        for how in ({"threshold": 0.3}, {}, {"threshold": 0.7})
    ]
    assert shares[0] > shares[1] > shares[2]


def test_a_broken_picture_has_no_mask_and_a_row_that_says_why(predicted, squares):
    (squares / "3.png").write_bytes(b"")
    folder = predicted(segmenter_of(), squares, out="masks")
    row = rows_of(folder / "predictions.csv")[3]
    assert (row["sample"], row["mask"], row["cell"]) == ("3.png", "", "")
    assert "cannot" in row["error"]
    assert not (folder / "3.png").exists()
    assert len(masks_of(folder)) == 18


def test_pictures_of_one_stem_keep_their_masks_apart(predicted, squares, tmp_path):
    folder = tmp_path / "twins"
    (folder / "below").mkdir(parents=True)
    (folder / "overlays").mkdir()
    for name in ("a.png", "a.jpg", "a.webp", "a.png.png", "below/a.png", "overlays/a.png"):
        Image.open(squares / "0.png").save(folder / name)
    out = predicted(segmenter_of(), folder, out="masks")
    rows = {row["sample"]: row["mask"] for row in rows_of(out / "predictions.csv")}
    assert rows == {
        "a.jpg": "a.png",
        "a.png": "a.png~2.png",
        "a.png.png": "a.png.png",
        "a.webp": "a.webp.png",
        "below/a.png": "below/a.png",
        "overlays/a.png": "overlays~/a.png",
    }
    assert masks_of(out).keys() == {f"{at}{name}" for name in rows.values() for at in ("", "overlays/")}


def test_a_data_set_of_masks_is_predicted_under_its_keys_also_where_one_is_there_twice(
    predicted, segmentation_dataset, mask_folder, tmp_path
):
    """Two tars of one split with the same samples, as others make them."""
    root, description = tmp_path / "set", segmentation_dataset / "dataset.json"
    shutil.copytree(segmentation_dataset, root)
    content = json.loads(description.read_text())
    content["splits"]["val"]["shards"] *= 2
    (root / "dataset.json").write_text(json.dumps(content))
    out = predicted(segmenter_of(), root, out="masks")
    rows, masks = rows_of(out / "predictions.csv"), masks_of(out)
    assert len(rows) == 12
    assert [row["mask"] for row in rows[:6]] == [f"{row['sample']}.png" for row in rows[:6]]
    assert [row["mask"] for row in rows[6:]] == [f"{row['sample']}~2.png" for row in rows[:6]]
    for row, other in zip(rows[:6], rows[6:], strict=True):
        truth = np.asarray(Image.open(mask_folder / "masks" / row["mask"]))
        assert masks[row["mask"]][1].shape == truth.shape
        assert np.array_equal(masks[row["mask"]][1], masks[other["mask"]][1])


NAMES = st.lists(
    st.text("ab./~", min_size=1, max_size=6).map(lambda name: name + ".png")
    | st.sampled_from(
        ["../a.png", "/a.png", "a/../b.jpg", "overlays/a.png", "a.png/b.png", "a.jpg", "a.png", ".png"]
    ),
    max_size=12,
)


@given(names=NAMES)
def test_no_two_pictures_share_a_mask_and_none_leaves_the_folder(names):
    name_of = mask_names(names)
    found = [name_of(number) for number in range(len(names))]
    assert len(set(found)) == len(names)
    for name in found:
        parts = name.split("/")
        assert not {"", ".", ".."} & set(parts)
        assert parts[-1].endswith(".png")
        assert parts[0] != OVERLAYS or len(parts) == 1
        assert not any(part.endswith(".png") for part in parts[:-1])
    assert found[:1] == [mask_of(name) for name in names[:1]]


def refusal(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert caught.value.mend
    return caught.value.code, caught.value.what


def test_what_cannot_be_done_is_refused_before_anything_is_written(
    predicted, squares, photo_dataset, tmp_path
):
    multiclass, multilabel, masks = classifier_of(), classifier_of("multilabel"), segmenter_of()
    (tmp_path / "list.csv").write_text("image\nsquares/0.png\n")
    (tmp_path / "list.txt").write_text("squares/0.png\n")
    (tmp_path / "file").write_text("")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    cropped = replace(masks, transforms=(*CROP, ("random_crop", {"size": 8})))
    calls = [
        ("USAGE", "predict.out", multiclass, squares, {"out": "out.xlsx"}),
        ("USAGE", "predict.out", multiclass, tmp_path / "list.csv", {"out": "list.csv"}),
        ("USAGE", "predict.out", masks, squares, {"out": "masks.csv"}),
        ("USAGE", "predict.out", masks, squares, {"out": "file"}),
        ("USAGE", "predict.out", masks, squares, {"out": "squares"}),
        ("USAGE", "predict.out", masks, squares, {"out": "squares/masks"}),
        ("USAGE", "predict.out", masks, squares / "0.png", {"out": "squares"}),
        ("USAGE", "predict.out", masks, tmp_path / "list.txt", {"out": "."}),
        ("USAGE", "predict.top_k: 4", multiclass, squares, {"top_k": 4}),
        ("USAGE", "predict.top_k", multilabel, squares, {"top_k": 1}),
        ("USAGE", "predict.threshold", multiclass, squares, {"threshold": 0.5}),
        ("USAGE", "predict.threshold", segmenter_of(2), squares, {"threshold": 0.5}),
        ("USAGE", "predict.split", multiclass, squares, {"split": "val"}),
        ("DATA", "predict.split", multiclass, photo_dataset, {"split": "nowhere"}),
        ("CONFIG", "data.eval_transforms: random_crop", cropped, squares, {"out": "m"}),
        ("UNSAFE", "a data set at", multiclass, "pipe:ls", {}),
        ("DATA", "no file or folder", multiclass, tmp_path / "none", {}),
        ("DATA", "no file or folder", multiclass, "x" * 300, {}),
    ]
    for code, what, saved, source, options in calls:
        found = refusal(predicted, saved, source, **options)
        assert (found[0], found[1].startswith(what)) == (code, True), found
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_without_a_source_there_is_nothing_to_do(accelerator, tmp_path):
    request = read_request(["predict", "--run-dir", str(tmp_path)])
    assert refusal(predict, request, accelerator, classifier_of())[0] == "USAGE"


def test_a_mask_that_a_crop_would_leave_incomplete_is_an_error_in_the_configuration(predicted, squares):
    saved = segmenter_of(transforms=(("center_crop", {"size": 24}),))
    code, what = refusal(predicted, saved, squares, out="masks")
    assert (code, "center_crop cuts off pixels of a picture of 32 x 32" in what) == ("CONFIG", True)


def test_an_output_is_replaced_only_by_a_whole_one(predicted, squares, tmp_path):
    out = predicted(classifier_of(transforms=()), squares)
    before = out.read_bytes()
    Image.new("RGB", (40, 40)).save(squares / "9.png")
    assert refusal(predicted, classifier_of(transforms=()), squares)[0] == "CONFIG"
    assert out.read_bytes() == before
    (tmp_path / ".out.csv.part-7").write_text("left behind by a process that was killed")
    Image.new("RGB", (32, 32)).save(squares / "9.png")
    predicted(classifier_of(transforms=()), squares)
    assert out.read_bytes() != before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_network_that_takes_no_pictures_of_this_size_is_no_crash(predicted, squares):
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    code, what = refusal(predicted, replace(classifier_of(transforms=()), network=linear), squares)
    assert (code, "takes no pictures of 32 x 32 pixels" in what) == ("DATA", True)


def test_numbers_that_are_none_are_an_error_in_their_row(predicted, squares):
    class Undefined(torch.nn.Module):
        def forward(self, images):
            outputs = images.mean(dim=(2, 3))
            outputs[0, 0] = torch.nan
            return outputs

    for kind in ("multiclass", "multilabel"):
        rows = rows_of(predicted(replace(classifier_of(kind, transforms=()), network=Undefined()), squares))
        assert [row["error"] != "" for row in rows] == [number % 7 == 0 for number in range(10)]
        assert all((row[CLASSES[0]] == "") == (row["error"] != "") for row in rows)


PROCESSES = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from accelerate import Accelerator
from test_prediction import classifier_of, segmenter_of
from training.command import read_request
from training.prediction import predict
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
flags = ["--data.workers", "1", "--eval.batch", "4", "--run-dir", "run"]
for words in json.loads(sys.argv[2]):
    masks = words.pop() == "masks"
    saved = segmenter_of() if masks else classifier_of()
    predict(read_request(["predict", *words, *flags]), accelerator, saved)
accelerator.end_training()
"""


@pytest.mark.slow
def test_one_and_three_processes_write_the_same_files(
    execute, photo_folder, mask_folder, photo_dataset, tmp_path
):
    suffixes = ["csv", "jsonl"]
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        pass
    else:
        suffixes.append("parquet")
    broken_list(photo_folder, tmp_path)
    sources = {
        "folder": photo_folder,
        "list": tmp_path / "list.txt",
        "set": photo_dataset,
        "one": photo_folder / "cat" / "01.jpg",
    }
    program = tmp_path / "program.py"
    program.write_text(PROCESSES)
    for processes in (1, 3):
        calls = [
            [f"--predict.source={source}", f"--predict.out={processes}/{name}.{suffix}", "rows"]
            for name, source in sources.items()
            for suffix in suffixes
        ]
        calls.append(
            [
                f"--predict.source={mask_folder / 'images'}",
                f"--predict.out={processes}/masks",
                "--predict.tta=flips",
                "masks",
            ]
        )
        torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", f"--nproc_per_node={processes}"]
        done = execute([*torchrun, program, Path(__file__).parent, json.dumps(calls)])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written ") == len(calls)
    files = {
        path.relative_to(tmp_path / "1").as_posix(): path
        for path in (tmp_path / "1").rglob("*")
        if path.is_file()
    }
    assert len(files) == 4 * len(suffixes) + 2 * 24 + 1
    others = {
        path.relative_to(tmp_path / "3").as_posix(): path
        for path in (tmp_path / "3").rglob("*")
        if path.is_file()
    }
    assert files.keys() == others.keys()
    for name, path in files.items():
        assert path.read_bytes() == others[name].read_bytes(), name
    assert len(rows_of(tmp_path / "3" / "folder.csv")) == 60
