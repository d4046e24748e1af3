"""Tars that others made are indexed as they are, whoever made them and whatever their labels are."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.fault import UserError
from data_pipeline.foreign import IndexOptions, index_tars
from data_pipeline.index import index_name, read_dataset
from data_pipeline.member_kinds import Wish, detect
from data_pipeline.read import ShardReader
from data_pipeline.shard_files import assign_splits, find_shards
from data_pipeline.shard_index import MISSING, read_shard_index
from data_pipeline.store import Folder


def write_tar(path, members, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def png(array):
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def pictures(photographs):
    """Twenty-four small JPEGs, each another crop, grey ones not among them."""
    found = []
    for number in range(24):
        photo = list(photographs.values())[number % 3]
        file = io.BytesIO()
        Image.fromarray(photo[number : number + 40, number : number + 50]).save(file, "JPEG")
        found.append(file.getvalue())
    return found


@pytest.fixture
def tars(tmp_path, pictures):
    """`tars(target)` writes train-000 to -002 of 6 samples and val-000 of 4; target(i): other members."""

    def write(target, folder="tars", image="jpg"):
        root = tmp_path / folder
        root.mkdir()
        for shard, name in enumerate(["train-000", "train-001", "train-002", "val-000"]):
            members = []
            for number in range(shard * 6, shard * 6 + (4 if name.startswith("val") else 6)):
                key = f"part/{number:04d}"
                members.append((f"{key}.{image}", pictures[number]))
                members += [(f"{key}.{extension}", data) for extension, data in target(number).items()]
            write_tar(root / f"{name}.tar", members)
        return root

    return write


def made(root, destination=None, *, wish=None, **options):
    splits = assign_splits(find_shards([str(root)]), [])
    reading = detect([tar for one in splits.values() for tar in one], wish or Wish())
    done = index_tars(splits, destination or root, reading, options=IndexOptions(**options))
    assert done.dataset == read_dataset(destination or root)
    return done


def samples(root, split="train"):
    dataset = read_dataset(root)
    reader = ShardReader(Folder(root, tars=dataset.tars), dataset, split)
    found = reader.read_many(np.arange(dataset.split(split).samples))
    reader.close()
    assert [raw.fault for raw in found if raw.fault] == []
    return found


def number_of(number):
    return {"cls": b"%d" % (number % 3)}


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("photo_dataset", ("astronaut", "cat", "coffee")),
        ("multilabel_dataset", ()),
        ("segmentation_dataset", ()),
    ],
)
def test_packed_tars_get_the_very_index_that_packing_gave_them(name, classes, request, tmp_path):
    packed = request.getfixturevalue(name)
    for tar in packed.glob("*.tar"):
        shutil.copy(tar, tmp_path / tar.name)
    if name == "multilabel_dataset":
        classes = read_dataset(packed).classes
    made(tmp_path, classes=classes)
    found, expected = read_dataset(tmp_path), read_dataset(packed)
    assert found.splits == expected.splits  # with the SHA-256 of each index
    assert (found.task, found.classes, found.image_mode) == (
        expected.task,
        expected.classes,
        expected.image_mode,
    )
    assert (found.mean, found.std, found.mask_values) == (expected.mean, expected.std, expected.mask_values)


@pytest.mark.parametrize("kind", ["webdataset", "gnu", "pax", "ustar", "oldgnu"])
def test_tars_of_other_programs_are_read_as_they_are(kind, pictures, tmp_path):
    root = tmp_path / "tars"
    root.mkdir()
    keys = [f"deep folder/größe {number}" if kind != "ustar" else f"deep/{number}" for number in range(8)]
    if kind == "webdataset":
        with webdataset.TarWriter(str(root / "a.tar")) as writer:
            for number, key in enumerate(keys):
                writer.write({"__key__": key, "jpg": pictures[number], "cls": number % 2})
    else:
        source = tmp_path / "source"
        for number, key in enumerate(keys):
            (source / key).parent.mkdir(parents=True, exist_ok=True)
            (source / f"{key}.jpg").write_bytes(pictures[number])
            (source / f"{key}.cls").write_bytes(b"%d\n" % (number % 2))
        words = ["tar", f"--format={kind}", "-cf", root / "a.tar", "-C", source, "."]
        subprocess.run(list(map(str, words)), check=True)
        keys = [f"./{key}" for key in keys]
    made(root)
    found = {raw.key: (raw.image, raw.label) for raw in samples(root)}
    assert found == {key: (pictures[number], number % 2) for number, key in enumerate(keys)}


def test_tars_like_those_of_img2dataset_need_a_named_field(tars, pictures):
    def target(number):
        about = {
            "caption": f"photo {number}",
            "url": "http://x",
            "status": "success",
            "animal": ["cat", "dog"][number % 2],
        }
        return {"json": json.dumps(about).encode(), "txt": f"photo {number}".encode()}

    root = tars(target)
    with pytest.raises(
        UserError, match="no member holds labels; the JSON has the fields animal, caption"
    ) as caught:
        made(root)
    assert "captions" in caught.value.what
    assert "--field" in caught.value.mend
    done = made(root, wish=Wish(fields=("animal",)))
    assert done.dataset.classes == ("cat", "dog")
    assert [raw.label for raw in samples(root)] == [0, 1] * 9
    assert [raw.image for raw in samples(root)] == pictures[:18]


def test_members_in_any_order_and_between_those_of_others_are_one_sample(tmp_path, pictures):
    write_tar(
        tmp_path / "a.tar",
        [("y.cls", b"1"), ("x.jpg", pictures[0]), ("y.json", b"{}"), ("x.cls", b"0"), ("y.jpg", pictures[1])],
    )
    made(tmp_path)
    assert [(raw.key, raw.label, raw.image) for raw in samples(tmp_path)] == [
        ("y", 1, pictures[1]),
        ("x", 0, pictures[0]),
    ]


def flags(number):
    return {"a": number % 2, "b": None if number % 3 == 0 else 1, "ç": bool(number % 4 == 0)}


def as_json(record):
    return json.dumps(record).encode()


def half(number):
    return number % 2


class Case(NamedTuple):
    target: object
    classes: tuple
    label: object
    wish: Wish = Wish()
    task: str = "multiclass"


CASES = {
    "numbers": Case(number_of, ("0", "1", "2"), lambda one: one % 3),
    "upper case": Case(lambda one: {"CLASS": b"%d\n" % half(one)}, ("0", "1"), half),
    "gaps": Case(lambda one: {"cls": b"%d" % (4 * half(one))}, tuple("01234"), lambda one: 4 * half(one)),
    "names": Case(
        lambda one: {"txt": b"cat" if half(one) else b"dog"}, ("cat", "dog"), lambda one: 1 - half(one)
    ),
    "field": Case(lambda one: {"json": as_json({"label": half(one), "x": 1})}, ("0", "1"), half),
    "text in a field": Case(lambda one: {"json": as_json({"class": f"k{half(one)}"})}, ("k0", "k1"), half),
    "named field": Case(
        lambda one: {"meta.json": as_json({"x": f"k{half(one)}"}), "cls": b"0"},
        ("k0", "k1"),
        half,
        Wish((), "meta.json", ("x",)),
    ),
    "named member": Case(
        lambda one: {"kind": b"k%d" % half(one), "cls": b"0"}, ("k0", "k1"), half, Wish((), "kind")
    ),
    "labels": Case(
        lambda one: {"json": as_json({"labels": flags(one)})}, ("a", "b", "ç"), flags, Wish(), "multilabel"
    ),
    "list": Case(
        lambda one: {"json": as_json({"labels": list(flags(one).values())})},
        ("0", "1", "2"),
        flags,
        Wish(),
        "multilabel",
    ),
    "fields": Case(
        lambda one: {"json": as_json(flags(one))},
        ("ç", "a"),
        lambda one: {name: flags(one)[name] for name in ("ç", "a")},
        Wish((), "", ("ç", "a")),
        "multilabel",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_labels_of_every_kind_are_found_and_read(tars, case):
    target, classes, label, wish, task = case
    root = tars(target)
    done = made(root, wish=wish)
    assert (done.dataset.task, done.dataset.classes) == (task, classes)
    for split, first in (("train", 0), ("val", 18)):
        found = samples(root, split)
        expected = [label(first + place) for place in range(len(found))]
        if task == "multiclass":
            assert [raw.label for raw in found] == expected
            counts = np.bincount(expected, minlength=len(classes)).tolist()
        else:
            rows = [[MISSING if one is None else int(one) for one in row.values()] for row in expected]
            assert [raw.label.tolist() for raw in found] == rows
            counts = (np.array(rows) == 1).sum(axis=0).tolist()
        assert list(done.dataset.split(split).class_counts) == counts


def mask_of(number, values=(0, 255), extension="mask.png", height=40):
    mask = np.full((height, 50), values[0], np.uint8)
    for place, value in enumerate(values[1:]):
        mask[: number + 1, 10 * place : 10 * place + 10] = value
    return {extension: png(mask)}


@pytest.mark.parametrize("extension", ["mask.png", "seg.png", "mask", "png", "label_mask.png", "MASK.PNG"])
@pytest.mark.parametrize(
    ("values", "classes", "mask_values"),
    [
        ((0, 255), ("background", "foreground"), (0, 255)),
        ((0, 1), ("background", "foreground"), (0, 1)),
        ((0, 1, 3, 255), ("0", "1", "2", "3"), (0, 1, 2, 3)),
    ],
)
def test_masks_are_found_and_their_values_are_the_classes(tars, extension, values, classes, mask_values):
    root = tars(lambda number: mask_of(number, values, extension))
    done = made(root)
    assert (done.dataset.task, done.dataset.classes) == ("segmentation", classes)
    assert done.dataset.mask_values == mask_values
    assert done.dataset.members.target == extension
    assert [raw.mask for raw in samples(root, "val")] == [
        mask_of(number, values, extension)[extension] for number in range(18, 22)
    ]
    pixels = np.zeros(256, np.int64)
    for number in range(18):
        mask = np.asarray(Image.open(io.BytesIO(mask_of(number, values)["mask.png"])))
        pixels += np.bincount(mask.ravel(), minlength=256)
    assert done.dataset.split("train").class_counts == tuple(pixels[list(mask_values)].tolist())


def test_a_mask_of_another_size_than_its_image_is_refused_by_name(tars):
    root = tars(lambda number: mask_of(number, height=41 if number == 7 else 40))
    with pytest.raises(
        UserError, match=r"'train-001.tar' mask 'part/0007.mask.png' is 50 x 41 pixels, its"
    ) as caught:
        made(root)
    assert caught.value.place["member"] == "part/0007.mask.png"


COLOURED = png(np.full((40, 50, 3), (1, 2, 3), np.uint8))


@pytest.mark.parametrize("data", [b"", b"no picture", b"\xff\xd8\xff\xe0 jpeg", COLOURED])
def test_a_mask_that_is_none_is_refused_by_name(tars, data):
    root = tars(lambda number: {"mask.png": data} if number == 9 else mask_of(number))
    with pytest.raises(UserError, match=r"'part/0009.mask.png'"):
        made(root)


def test_the_image_may_have_any_name_that_ends_as_a_picture(tars):
    root = tars(lambda number: {"seg.png": mask_of(number)["mask.png"]}, image="rgb.jpg")
    done = made(root)
    assert done.dataset.members.image == ("rgb.jpg",)
    root = tars(number_of, folder="upper", image="JPG")
    assert made(root).dataset.members.image == ("JPG",)
    root = tars(lambda number: {"right.jpg": b"", **number_of(number)}, folder="pair", image="left.jpg")
    with pytest.raises(UserError, match=r"which member is the image\? There is 2: \.left\.jpg, \.right\.jpg"):
        made(root)
    assert made(root, wish=Wish(image=("left.jpg",))).dataset.members.image == ("left.jpg",)


@pytest.mark.parametrize(
    "bad", [b"-1", b"C", b"999999", b"", b"abc", b"1.5", b"NaN", "\u0663".encode(), b"7" * 10**7]
)
def test_a_bad_label_is_told_with_value_shard_key_and_range(tars, bad):
    root = tars(lambda number: {"cls": bad} if number == 8 else number_of(number))
    with pytest.raises(UserError, match="allowed are the class numbers 0 to") as caught:
        made(root)
    assert caught.value.code == "DATA"
    assert caught.value.place["shard"] == "train-001.tar"
    assert caught.value.place["member"] == "part/0008.cls"
    assert repr(bad[:10].decode())[1:-1] in caught.value.what
    assert not (root / "dataset.json").exists()
    assert sorted(path.suffix for path in root.iterdir()) == [".tar"] * 4


def test_a_label_beyond_the_named_classes_is_told(tars):
    root = tars(lambda number: {"cls": b"3"} if number == 8 else number_of(number))
    with pytest.raises(
        UserError, match=r"'part/0008.cls': the label is '3', allowed are the class numbers 0 to 2"
    ):
        made(root, classes=("x", "y", "z"))


def test_a_class_number_far_above_all_others_is_taken_for_a_mistake(tars):
    root = tars(lambda number: {"cls": b"21000"} if number == 8 else number_of(number))
    with pytest.raises(
        UserError, match=r"'train-001.tar': sample 'part/0008' has the class number 21000"
    ) as caught:
        made(root)
    assert "--classes-file" in caught.value.mend
    done = made(root, classes=tuple(f"c{number}" for number in range(21841)))
    assert done.dataset.split("train").class_counts[21000] == 1


def test_missing_images_and_targets_are_listed_and_left_out_only_when_asked(tmp_path, pictures):
    members = [(f"{number:02d}.jpg", pictures[number]) for number in range(24) if number % 2 == 0]
    members += [(f"{number:02d}.cls", b"1") for number in range(24) if number % 3 == 0]
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=r"4 samples have no image \(.*\), 8 no target \(\.cls\)") as caught:
        made(tmp_path)
    lines = caught.value.what.splitlines()
    assert lines[1:] == [
        *[f"'{number:02d}' in a.tar has no image" for number in (3, 9, 15, 21)],
        *[f"'{number:02d}' in a.tar has no target" for number in (2, 4, 8, 10, 14, 16)],
        "and 2 more",
    ]
    done = made(tmp_path, skip_incomplete=True)
    assert [raw.key for raw in samples(tmp_path)] == ["00", "06", "12", "18"]
    assert (done.totals.no_image, done.totals.no_target) == (4, 8)


def test_a_key_in_two_tars_of_a_split_is_refused_unless_the_tar_is_part_of_it(tmp_path, pictures):
    for name in ("train-0", "train-1", "val-0"):
        write_tar(
            tmp_path / f"{name}.tar",
            [("7.jpg", pictures[0]), ("7.cls", b"0"), (f"{name}.jpg", pictures[1]), (f"{name}.cls", b"1")],
        )
    with pytest.raises(
        UserError, match=r"1 keys are in two tars of train:\nkey '7' is in train-0.tar and in train-1.tar"
    ) as caught:
        made(tmp_path)
    assert "--key-scope shard" in caught.value.mend
    made(tmp_path, shard_scope=True)
    assert [raw.key for raw in samples(tmp_path)] == [
        "train-0/7",
        "train-0/train-0",
        "train-1/7",
        "train-1/train-1",
    ]


def test_many_keys_are_compared_a_part_at_a_time(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("data_pipeline.foreign.AT_ONCE", 5)
    for shard in range(3):
        write_tar(
            tmp_path / f"{shard}.tar",
            [
                (f"{number}.{end}", b"0")
                for number in (*range(shard * 100, shard * 100 + 30), 1000)
                for end in ("jpg", "cls")
            ],
        )
    with pytest.raises(
        UserError, match=r"1 keys are in .*\nkey '1000' is in 0.tar and in 1.tar and in 2.tar$"
    ):
        made(tmp_path)


def test_all_tars_that_cannot_be_used_are_told_at_once(tars):
    root = tars(number_of)
    data = (root / "train-001.tar").read_bytes()
    (root / "train-001.tar").write_bytes(data[: len(data) // 2 + 100])
    (root / "train-002.tar").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        made(root)
    lines = caught.value.what.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("'train-001.tar' is cut off")
    assert lines[1].startswith("'train-002.tar' is empty")
    assert caught.value.place["shard"] == "train-001.tar"


def test_an_unsafe_tar_makes_the_whole_unsafe(tars, tmp_path):
    root = tars(number_of)
    with tarfile.open(root / "train-001.tar", "a") as tar:
        link = tarfile.TarInfo("part/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (root / "train-000.tar").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        made(tmp_path / "tars")
    assert caught.value.code in ("DATA", "UNSAFE")  # the first shard is looked into before all are read
    (root / "train-000.tar").unlink()
    with pytest.raises(UserError, match="symbolic link") as caught:
        made(root)
    assert caught.value.code == "UNSAFE"


def test_members_that_would_run_code_are_counted_and_never_opened(tars, tmp_path):
    canary = tmp_path / "canary"
    bomb = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    root = tars(
        lambda number: {**number_of(number), "pkl": bomb, "pyd": bomb, "pth": bomb, "npy": b"\x93NUMPY"}
    )
    done = made(root)
    assert done.totals.ignored == {f"unsupported .{one}": 22 for one in ("npy", "pkl", "pth", "pyd")}
    shard = done.dataset.split("train").shards[0]
    assert read_shard_index(root / shard.index_name, shard).extensions == ["cls", "jpg"]
    assert not canary.exists()


def test_the_same_files_come_of_any_number_of_workers(tars):
    one, three = tars(number_of), tars(number_of, folder="again")
    made(one, workers=1)
    made(three, workers=3)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in three.iterdir())
    assert len(names) == 9
    for name in names:
        assert (one / name).read_bytes() == (three / name).read_bytes()


def test_with_another_destination_the_tars_folder_is_left_alone(tars, tmp_path):
    root = tars(number_of)
    before = {path.name: path.stat().st_mtime_ns for path in root.iterdir()}
    done = made(root, tmp_path / "index")
    assert {path.name: path.stat().st_mtime_ns for path in root.iterdir()} == before
    assert done.dataset.tars == str(root)
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        "dataset.json",
        *sorted(index_name(name) for name in before),
    ]
    assert [raw.label for raw in samples(tmp_path / "index")] == [number % 3 for number in range(18)]
    beside = made(root)
    assert beside.dataset.tars == ""
    assert beside.dataset.identity() == done.dataset.identity()


def test_a_data_set_that_is_there_is_replaced_only_with_force(tars):
    root = tars(number_of)
    made(root)
    before = (root / "dataset.json").read_bytes()
    with pytest.raises(UserError, match="already holds a data set") as caught:
        made(root)
    assert "--force" in caught.value.mend
    assert (root / "dataset.json").read_bytes() == before
    assert made(root, force=True, classes=("x", "y", "z")).dataset.classes == ("x", "y", "z")


def test_an_index_of_another_program_is_never_overwritten(tars):
    root = tars(number_of)
    (root / "train-001.idx").write_text("v1.2 6\n0 512 jpg\n")
    with pytest.raises(UserError, match=r"train-001.idx' is there already and is no index of lockstep"):
        made(root, force=True)
    assert (root / "train-001.idx").read_text().startswith("v1.2")


def test_a_broken_off_run_is_no_hindrance_and_leaves_nothing(tars):
    root = tars(number_of)
    (root / ".indexing").mkdir()
    (root / ".indexing" / "train-000.tar.json").write_text("{")
    made(root)
    assert sorted({path.suffix for path in root.iterdir()}) == [".idx", ".json", ".tar"]


def test_a_folder_that_cannot_be_written_leads_to_out(tars, tmp_path):
    root = tars(number_of)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into") as caught:
        made(root, tmp_path / "file" / "below")
    assert "--out DEST" in caught.value.mend


@contextmanager
def read_only(folder, where):
    """The folder at a place where nobody, root included, can write into it."""
    where.mkdir()
    if os.geteuid() != 0:
        shutil.copytree(folder, where, dirs_exist_ok=True)
        where.chmod(0o555)
        yield
        where.chmod(0o755)
        return
    if subprocess.run(["mount", "--bind", folder, where], check=False, capture_output=True).returncode:
        pytest.skip("root can write everywhere, and nothing can be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", where], check=True)
        yield
    finally:
        subprocess.run(["umount", where], check=True)


def test_a_read_only_folder_leads_to_out(tars, tmp_path):
    root, where = tars(number_of), tmp_path / "read only"
    with read_only(root, where):
        with pytest.raises(UserError, match=r"cannot write into .*read only") as caught:
            made(where)
        assert "--out DEST" in caught.value.mend
        made(where, tmp_path / "index")
    assert not (root / "dataset.json").exists()


def test_tars_without_samples_are_left_out_by_name(tars):
    root = tars(number_of)
    write_tar(root / "train-003.tar", [])
    done = made(root)
    assert done.totals.empty == ["train-003.tar"]
    assert [shard.name for shard in done.dataset.split("train").shards] == [
        f"train-00{one}.tar" for one in range(3)
    ]
    assert not (root / "train-003.idx").exists()


def test_images_that_cannot_be_decoded_are_told_and_do_not_hinder(tmp_path, pictures):
    write_tar(
        tmp_path / "a.tar", [("a.jpg", pictures[0]), ("a.cls", b"0"), ("b.jpg", b"broken"), ("b.cls", b"1")]
    )
    done = made(tmp_path)
    assert done.decoded == 1
    assert len(done.broken) == 1
    assert done.broken[0].startswith("a.tar: 'b': cannot decode")


def test_grey_images_make_a_grey_data_set(tmp_path, photographs):
    grey = photographs["cat"][:40, :50].mean(axis=2).astype(np.uint8)
    write_tar(
        tmp_path / "a.tar",
        [("a.png", png(grey)), ("a.cls", b"0"), ("b.png", png(grey // 2)), ("b.cls", b"1")],
    )
    dataset = made(tmp_path).dataset
    assert dataset.image_mode == "L"
    values = np.concatenate([grey.ravel(), (grey // 2).ravel()]) / 255
    assert dataset.mean == pytest.approx((values.mean(),), abs=1e-6)
    assert dataset.std == pytest.approx((values.std(),), abs=1e-6)


def test_lists_of_labels_have_one_length(tars):
    root = tars(
        lambda number: {"json": json.dumps({"labels": [1, 0, 1][: 2 if number == 4 else 3]}).encode()}
    )
    with pytest.raises(UserError, match="'part/0004' has a list of 2 labels, not 3"):
        made(root)
    root = tars(
        lambda number: {"json": json.dumps({"labels": [1, 0, 1][: 2 if number > 5 else 3]}).encode()}, "more"
    )
    with pytest.raises(UserError, match="different lengths, up to 3"):
        made(root)


def test_a_label_that_no_sample_has_is_refused(tars):
    root = tars(lambda number: {"json": json.dumps(flags(number)).encode()})
    with pytest.raises(UserError, match="the label 'typo' has no value in any sample"):
        made(root, wish=Wish(fields=("a", "typo")))
