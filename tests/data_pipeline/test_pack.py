import io
import json
import os
import resource
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image, ImageOps

from data_pipeline.fault import UserError
from data_pipeline.index import read_dataset
from data_pipeline.items import SourceOptions
from data_pipeline.pack import pack
from data_pipeline.sources import find_source

SHARDS = {"shard_samples": 10, "shard_bytes": 1 << 30}


def packed(folder, root, *, val_fraction=0.0, seed=0, workers=1, **options):
    source = find_source(folder, SourceOptions(val_fraction=val_fraction, seed=seed))
    return pack(source, root, workers=workers, seed=seed, **{**SHARDS, **options})


def stored(root, split="train"):
    """What any reader of WebDataset finds: members by key."""
    urls = [str(root / shard.name) for shard in read_dataset(root).split(split).shards]
    return {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}


def shown(sample):
    name = next(name for name in ("jpg", "png", "webp") if name in sample)
    return name, Image.open(io.BytesIO(sample[name]))


def hashes(root):
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in root.iterdir()}


@pytest.fixture
def one_class(tmp_path):
    folder = tmp_path / "source" / "only"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def photo(photographs):
    return Image.fromarray(photographs["cat"][:60, :90])


def test_the_bytes_depend_on_neither_the_workers_nor_the_day(photo_folder, tmp_path):
    source = shutil.copytree(photo_folder, tmp_path / "source")
    (source / "cat" / "broken.png").write_bytes(b"no picture")
    packed(source, tmp_path / "a", val_fraction=0.2)
    for path in source.rglob("*.jpg"):
        os.utime(path, (0, 0))
    packed(source, tmp_path / "b", val_fraction=0.2)
    packed(source, tmp_path / "c", val_fraction=0.2, workers=3)
    assert len(hashes(tmp_path / "a")) == 2 * 7 + 2
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") == hashes(tmp_path / "c")


def test_another_seed_packs_another_order(photo_folder, tmp_path):
    packed(photo_folder, tmp_path / "a")
    packed(photo_folder, tmp_path / "b", seed=1)
    one, other = list(stored(tmp_path / "a")), list(stored(tmp_path / "b"))
    assert one != other
    assert sorted(one) == sorted(other)


def test_neighbours_in_a_shard_are_of_mixed_classes(photo_dataset):
    labels = [int(sample["cls"]) for sample in stored(photo_dataset).values()]
    assert len(set(labels[:10])) == 3


def test_every_picture_is_stored_once_with_the_bytes_that_it_had(photo_folder, tmp_path):
    packed(photo_folder, tmp_path / "root", val_fraction=0.3)
    samples = {**stored(tmp_path / "root"), **stored(tmp_path / "root", "val")}
    files = {str(path.relative_to(photo_folder).with_suffix("")): path for path in photo_folder.rglob("*.*g")}
    assert samples.keys() == files.keys()
    for key, path in files.items():
        assert samples[key][path.suffix[1:]] == path.read_bytes()


def test_every_class_is_split_by_itself(photo_folder, tmp_path):
    dataset = packed(photo_folder, tmp_path / "root", val_fraction=0.25).dataset
    assert dataset.classes == ("astronaut", "cat", "coffee")
    assert dataset.split("train").class_counts == (15, 15, 15)
    assert dataset.split("val").class_counts == (5, 5, 5)
    assert not stored(tmp_path / "root").keys() & stored(tmp_path / "root", "val").keys()


def test_shards_close_at_their_number_of_samples_or_of_bytes(photo_folder, tmp_path):
    by_number = packed(photo_folder, tmp_path / "a", shard_samples=25).dataset.split("train")
    assert by_number.shard_samples.tolist() == [25, 25, 10]
    by_bytes = packed(photo_folder, tmp_path / "b", shard_samples=1000, shard_bytes=20_000)
    assert len(by_bytes.dataset.split("train").shards) > 3
    assert by_bytes.dataset.split("train").samples == 60
    huge_pictures = packed(photo_folder, tmp_path / "c", shard_bytes=1).dataset.split("train")
    assert huge_pictures.shard_samples.tolist() == [1] * 60


def test_the_index_says_how_large_each_shard_is_and_its_hash(photo_dataset):
    for split in read_dataset(photo_dataset).splits.values():
        for shard in split.shards:
            data = (photo_dataset / shard.name).read_bytes()
            assert (shard.bytes, shard.sha256) == (len(data), sha256(data).hexdigest())


def test_mean_and_deviation_are_those_of_the_training_pixels(photo_dataset):
    dataset = read_dataset(photo_dataset)
    pictures = [shown(sample)[1].convert("RGB") for sample in stored(photo_dataset).values()]
    pixels = np.concatenate([np.asarray(picture).reshape(-1, 3) for picture in pictures]) / 255
    assert np.allclose(dataset.mean, pixels.mean(axis=0), atol=1e-6)
    assert np.allclose(dataset.std, pixels.std(axis=0), atol=1e-6)
    assert dataset.image_mode == "RGB"


def test_grey_pictures_make_a_grey_data_set_and_one_colour_picture_a_coloured_one(one_class, photo, tmp_path):
    photo.convert("L").save(one_class / "a.png")
    grey = packed(one_class.parent, tmp_path / "grey").dataset
    photo.save(one_class / "b.png")
    mixed = packed(one_class.parent, tmp_path / "mixed").dataset
    assert (grey.image_mode, len(grey.mean)) == ("L", 1)
    assert (mixed.image_mode, len(mixed.mean)) == ("RGB", 3)


def test_what_cannot_be_read_is_left_out_and_reported_with_its_reason(one_class, photo, tmp_path):
    photo.save(one_class / "good.jpg")
    whole = (one_class / "good.jpg").read_bytes()
    (one_class / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (one_class / "page.png").write_text("<html>404</html>")
    (one_class / "empty.png").touch()
    (one_class / "gone.png").symlink_to(one_class / "nowhere.png")
    photo.save(one_class / "animation.gif")
    (one_class / "animation.gif").rename(one_class / "gif.png")
    (one_class / "notes.txt").write_text("not a picture, and not called one")
    result = packed(one_class.parent, tmp_path / "root")
    reasons = {Path(path).name: reason for path, reason in result.bad}
    assert reasons.keys() == {"cut.jpg", "page.png", "empty.png", "gone.png", "gif.png"}
    assert reasons["page.png"] == "cannot decode: cannot identify image file"
    assert "No such file" in reasons["gone.png"]
    rows = [json.loads(line) for line in (tmp_path / "root" / "bad_files.jsonl").read_text().splitlines()]
    assert [(row["path"], row["error"]) for row in rows] == list(result.bad)
    assert list(stored(tmp_path / "root")) == ["only/good"]
    assert result.dataset.split("train").samples == 1


def test_a_shard_of_which_nothing_can_be_read_is_not_written(one_class, photo, tmp_path):
    photo.save(one_class / "good.jpg")
    for number in range(3):
        (one_class / f"{number}.jpg").write_bytes(b"")
    result = packed(one_class.parent, tmp_path / "root", shard_samples=1)
    assert len(result.dataset.split("train").shards) == 1
    assert len(list((tmp_path / "root").glob("*.tar"))) == len(list((tmp_path / "root").glob("*.idx"))) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_stored_upright(one_class, photo, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a description"
    photo.save(one_class / "a.jpg", exif=exif, quality=95)
    packed(one_class.parent, tmp_path / "root")
    kind, picture = shown(stored(tmp_path / "root")["only/a"])
    expected = Image.open(one_class / "a.jpg")
    if orientation == 1:
        assert kind == "jpg"
    else:
        assert kind == "png"
        assert picture.getexif().get(0x0112) is None
        assert np.array_equal(np.asarray(picture), np.asarray(ImageOps.exif_transpose(expected)))


def test_sixteen_bits_are_scaled_to_eight(one_class, tmp_path):
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for name in ("a.png", "b.tif"):
        Image.fromarray(values).save(one_class / name)
    dataset = packed(one_class.parent, tmp_path / "root").dataset
    for sample in stored(tmp_path / "root").values():
        _, picture = shown(sample)
        assert picture.mode == "L"
        assert np.array_equal(np.asarray(picture), np.round(values * (255 / 65535)))
    assert dataset.mean[0] == pytest.approx(0.5, abs=0.002)


@pytest.mark.parametrize("extension", ["bmp", "tif", "ppm"])
def test_formats_that_readers_do_not_know_are_stored_as_png(one_class, photo, tmp_path, extension):
    photo.save(one_class / f"a.{extension}")
    packed(one_class.parent, tmp_path / "root")
    kind, picture = shown(stored(tmp_path / "root")["only/a"])
    assert kind == "png"
    assert np.array_equal(np.asarray(picture), np.asarray(photo))


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "1", "L"])
def test_pictures_that_every_reader_shows_alike_keep_their_bytes(one_class, photo, tmp_path, mode):
    photo.convert(mode).save(one_class / "a.png")
    dataset = packed(one_class.parent, tmp_path / "root").dataset
    assert stored(tmp_path / "root")["only/a"]["png"] == (one_class / "a.png").read_bytes()
    assert dataset.image_mode == ("RGB" if mode in ("RGBA", "P") else "L")
    expected = np.asarray(photo.convert(mode).convert(dataset.image_mode)) / 255
    assert np.allclose(dataset.mean, expected.reshape(-1, len(dataset.mean)).mean(axis=0), atol=1e-6)


def test_a_cmyk_photograph_is_stored_as_rgb(one_class, photo, tmp_path):
    photo.convert("CMYK").save(one_class / "a.jpg", icc_profile=b"a CMYK profile")
    packed(one_class.parent, tmp_path / "root")
    kind, picture = shown(stored(tmp_path / "root")["only/a"])
    assert (kind, picture.mode) == ("png", "RGB")
    assert "icc_profile" not in picture.info
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(one_class / "a.jpg").convert("RGB")))


def test_files_that_share_a_stem_are_samples_of_their_own(one_class, photo, tmp_path):
    for name in ("a.jpg", "a.png", "a.webp", "a~2.jpg", "b.c.png", "b_c.png"):
        photo.save(one_class / name)
    dataset = packed(one_class.parent, tmp_path / "root").dataset
    keys = set(stored(tmp_path / "root"))
    assert len(keys) == dataset.split("train").samples == 6
    assert {"only/a", "only/a~2", "only/b_c", "only/b_c~2"} <= keys


def test_any_file_name_becomes_a_key_that_a_reader_gives_back(one_class, photo, tmp_path):
    names = ["v1.2.final", "größe λ 猫 🐈", "x" * 200, "sp ace'\"\\", "-rf", "new\nline", "deep/er/still"]
    for name in names:
        path = one_class / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(path)
    packed(one_class.parent, tmp_path / "root")
    assert set(stored(tmp_path / "root")) == {f"only/{name.replace('.', '_')}" for name in names}


def test_a_name_that_is_not_utf8_is_packed_under_one_that_is(one_class, photo, tmp_path):
    photo.save(one_class / "a.png")
    (one_class / "a.png").rename(one_class / os.fsdecode(b"caf\xe9.png"))
    (one_class / os.fsdecode(b"caf\xe92.png")).write_bytes(b"no picture")
    result = packed(one_class.parent, tmp_path / "root")
    assert list(stored(tmp_path / "root")) == ["only/caf\\xe9"]
    assert len(result.bad) == 1
    json.loads((tmp_path / "root" / "bad_files.jsonl").read_text())


def test_hidden_files_and_folders_are_no_samples(one_class, photo, tmp_path):
    (one_class / ".ipynb_checkpoints").mkdir()
    (one_class.parent / ".cache").mkdir()
    for name in ("a.png", ".hidden.png", ".ipynb_checkpoints/a-checkpoint.png", "../.cache/b.png"):
        photo.save(one_class / name)
    packed(one_class.parent, tmp_path / "root")
    assert list(stored(tmp_path / "root")) == ["only/a"]


@pytest.mark.parametrize("held_out", ["val", "valid", "Validation"])
def test_folders_that_are_split_already_stay_split(photo_folder, tmp_path, held_out):
    root = tmp_path / "source"
    for split in ("train", held_out, "test"):
        shutil.copytree(photo_folder, root / split)
    shutil.rmtree(root / held_out / "cat")
    dataset = packed(root, tmp_path / "root", val_fraction=0.5).dataset
    assert {name: split.class_counts for name, split in dataset.splits.items()} == {
        "test": (20, 20, 20),
        "train": (20, 20, 20),
        "val": (20, 0, 20),
    }
    labels = {
        key.split("/")[0]: int(sample["cls"]) for key, sample in stored(tmp_path / "root", "val").items()
    }
    assert labels == {"astronaut": 0, "coffee": 2}


def test_two_names_for_one_split_are_read_together(photo_folder, tmp_path):
    for split in ("train", "val", "validation"):
        shutil.copytree(photo_folder, tmp_path / "source" / split)
    dataset = packed(tmp_path / "source", tmp_path / "root").dataset
    assert dataset.split("val").samples == 120
    assert len(stored(tmp_path / "root", "val")) == 120


def empty_source(root):
    root.mkdir()


def empty_class(root):
    (root / "cats").mkdir(parents=True)
    (root / "dogs").mkdir()
    Image.new("L", (8, 8)).save(root / "cats" / "a.png")


def a_file(root):
    root.touch()


def nothing(root):
    pass


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (nothing, "no folder"),
        (a_file, "is a file"),
        (empty_source, "is empty"),
        (empty_class, "dogs' holds no pictures"),
    ],
)
def test_a_source_without_pictures_is_an_error_that_names_it(tmp_path, make, words):
    make(tmp_path / "source")
    with pytest.raises(UserError, match=words) as caught:
        packed(tmp_path / "source", tmp_path / "root")
    assert caught.value.code == "DATA"
    assert str(tmp_path / "source") in caught.value.what
    assert not (tmp_path / "root").exists()


def test_a_class_that_training_would_never_see_is_an_error_that_names_it(photo_folder, tmp_path):
    source = shutil.copytree(photo_folder, tmp_path / "source")
    for path in (source / "cat").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="class 'cat' has no picture in the training split"):
        packed(source, tmp_path / "root")
    assert not (tmp_path / "root" / "dataset.json").exists()


def test_a_destination_that_holds_something_else_is_left_as_it_is(photo_folder, photo_dataset, tmp_path):
    taken = shutil.copytree(photo_dataset, tmp_path / "taken")
    (tmp_path / "file").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    before = hashes(taken)
    for root, words in ((taken, "already holds a data set"), (tmp_path / "file", "is a file")):
        with pytest.raises(UserError, match=words):
            packed(photo_folder, root)
    with pytest.raises(UserError, match=r"other files, such as 'thesis.tex'"):
        packed(photo_folder, tmp_path / "mine")
    assert hashes(taken) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_is_told_of_every_picture(photo_folder, tmp_path, workers):
    told = []
    packed(photo_folder, tmp_path / "root", val_fraction=0.2, workers=workers, progress=told.append)
    assert sum(told) == 60


def test_progressive_jpegs_are_counted_until_they_are_made_baseline(one_class, photo, tmp_path):
    for number in range(3):
        photo.save(one_class / f"{number}.jpg", progressive=True)
    photo.save(one_class / "baseline.jpg")
    as_they_are = packed(one_class.parent, tmp_path / "a")
    again = packed(one_class.parent, tmp_path / "b", reencode=True)
    assert as_they_are.remarks == (
        "warning: 3 JPEGs are progressive, 2.8x slower to decode: pack again with --reencode",
    )
    assert again.remarks == ()
    assert all("progressive" not in shown(one)[1].info for one in stored(tmp_path / "b").values())


def test_pictures_that_are_made_smaller_fill_tars_by_what_they_will_take(one_class, photographs, tmp_path):
    for number in range(8):
        Image.fromarray(photographs["astronaut"]).save(one_class / f"{number}.png")
    limit = (one_class / "0.png").stat().st_size
    as_they_are = packed(one_class.parent, tmp_path / "a", shard_bytes=limit).dataset
    smaller = packed(one_class.parent, tmp_path / "b", shard_bytes=limit, resize_shorter=32).dataset
    assert len(as_they_are.split("train").shards) == 8
    assert len(smaller.split("train").shards) == 1
    assert {shown(sample)[1].size for sample in stored(tmp_path / "b").values()} == {(32, 32)}


def test_a_name_that_readers_of_tars_skip_is_left_out_and_said(photo_folder, tmp_path):
    source = shutil.copytree(photo_folder, tmp_path / "source")
    (source / "cat" / "__MACOSX").mkdir()
    shutil.copy(source / "cat" / "01.jpg", source / "cat" / "__MACOSX")
    result = packed(source, tmp_path / "root")
    assert [(Path(path).name, reason) for path, reason in result.bad] == [
        ("01.jpg", "readers of tars take no sample 'cat/__MACOSX/01': give it another name")
    ]
    assert result.dataset.split("train").samples == 60


def test_a_machine_that_fails_is_no_fault_of_the_pictures(photo_folder, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    source = find_source(photo_folder, SourceOptions(val_fraction=0, seed=0))

    def no_more_files(_):
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))

    try:
        with pytest.raises(OSError, match="Too many open files"):
            pack(source, tmp_path / "root", workers=1, seed=0, progress=no_more_files, **SHARDS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not (tmp_path / "root" / "dataset.json").exists()
