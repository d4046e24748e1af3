import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import index_command
from data_pipeline.decode import decode
from data_pipeline.disk import file_sha256
from data_pipeline.doctor import Checked, Diagnosis, examine
from data_pipeline.doctor_labels import LabelCounts
from data_pipeline.doctor_report import report_lines
from data_pipeline.doctor_shards import Sums
from data_pipeline.doctor_splits import SplitReport, Use, check_sizes
from data_pipeline.draws import hash64
from data_pipeline.fault import UserError
from data_pipeline.findings import HURTS, KINDS, LIMIT, NOTE, Finding, Findings
from data_pipeline.index import Shard, Split, read_dataset, write_dataset
from data_pipeline.shard_index import make_shard_index, read_shard_index, write_shard_index
from data_pipeline.tars import tar_members

USE = Use(processes=2, global_batch=16)


@pytest.fixture
def photos(photo_dataset, tmp_path):
    return shutil.copytree(photo_dataset, tmp_path / "photos")


@pytest.fixture
def cells(segmentation_dataset, tmp_path):
    return shutil.copytree(segmentation_dataset, tmp_path / "cells")


@pytest.fixture
def findings(multilabel_dataset, tmp_path):
    return shutil.copytree(multilabel_dataset, tmp_path / "findings")


def diagnose(root, **options):
    return examine(str(root), USE, **options)


def found(root, code, **options):
    """The findings of a kind; whatever hurts must be among them, so that nothing is said twice."""
    findings = diagnose(root, **options).findings
    hurting = {one.code for one in findings if one.kind.severity == HURTS}
    assert hurting <= {code}, [one for one in findings if one.kind.severity == HURTS]
    return [one for one in findings if one.code == code]


def shard_of(root, split="train", position=0):
    return read_dataset(root).splits[split].shards[position]


def index_of(root, shard):
    return read_shard_index(root / shard.index_name, shard)


def members_of(tar):
    with tarfile.open(tar) as opened:
        return [(one.name, opened.extractfile(one).read()) for one in opened if one.isreg()]


def write_tar(tar, members):
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as opened:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            opened.addfile(about, io.BytesIO(data))


def change(root, shard, edit, **options):
    """Let `edit` change the members of a tar, {name: bytes}, and make everything else fit it again."""
    write_tar(root / shard.name, edit(dict(members_of(root / shard.name))).items())
    refit(root, shard, **options)


def refit(root, shard, *, labels=None, rows=None):
    """A new index for a shard, and a dataset.json whose checksums and sums fit: as if it were packed so."""
    old = index_of(root, shard)
    rows = tar_members(root / shard.name) if rows is None else rows
    if labels is None:
        by_key = dict(zip(old.keys, old.labels, strict=True))
        labels = np.array([by_key.get(key, old.labels[0]) for key in rows]).reshape(
            len(rows), *old.labels.shape[1:]
        )
    labels = labels.astype(old.labels.dtype)
    digest = write_shard_index(root / shard.index_name, make_shard_index(rows, labels))
    size = (root / shard.name).stat().st_size
    new = replace(
        shard, samples=len(rows), bytes=size, sha256=file_sha256(root / shard.name), index_sha256=digest
    )
    put(root, shard, new)


def put(root, shard, new):
    """Write dataset.json with another entry for a shard, and the sums that follow from all the indexes."""
    dataset = read_dataset(root)
    splits = {}
    for name, split in dataset.splits.items():
        shards = tuple(new if one == shard else one for one in split.shards)
        indexes = [index_of(root, one) for one in shards]
        digest = sum(hash64(key.encode()) for index in indexes for key in index.keys) % 2**64
        counts = split.class_counts
        if dataset.task != "segmentation":
            labels = np.concatenate([index.labels for index in indexes])
            ones = labels[:, None] == np.arange(len(counts)) if labels.ndim == 1 else labels == 1
            counts = tuple(ones.sum(axis=0).tolist())
        splits[name] = Split(shards, counts, f"{digest:016x}")
    write_dataset(root, replace(dataset, splits=splits))


def picture(array, form="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=form, **options)
    return buffer.getvalue()


def bomb(width, height):
    """A PNG whose header announces far more pixels than its bytes could ever hold."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def kept_members(tar, rows, keep):
    """The members of the samples that are to be kept."""
    kept = {key for key, one in zip(rows, keep, strict=True) if one}
    return [(name, data) for name, data in members_of(tar) if name.partition(".")[0] in kept]


def with_checksum(data, crc32):
    """`data` with four bytes behind it that make its CRC-32 what is wanted."""
    table = [zlib.crc32(bytes([byte]), 0xFFFFFFFF) ^ 0xFFFFFFFF for byte in range(256)]
    tops = {entry >> 24: number for number, entry in enumerate(table)}
    state = crc32 ^ 0xFFFFFFFF
    for _ in range(4):
        number = tops[state >> 24]
        state = (state ^ table[number]) << 8 & 0xFFFFFFFF | number
    start = zlib.crc32(data) ^ 0xFFFFFFFF
    return data + (state ^ start).to_bytes(4, "little")


def image_name(root, shard, row=0, kinds=("jpg", "png")):
    """Key and member name of the image of the row-th sample that has one of these kinds."""
    rows = [
        (key, f"{key}.{kind}")
        for key, row in tar_members(root / shard.name).items()
        for kind in kinds
        if kind in row
    ]
    return rows[row]


# A healthy data set.


@pytest.mark.parametrize("name", ["photo_dataset", "multilabel_dataset", "segmentation_dataset"])
def test_nothing_hurts_in_a_healthy_data_set(name, request):
    root = request.getfixturevalue(name)
    diagnosis = diagnose(root)
    assert [one for one in diagnosis.findings if one.kind.severity == HURTS] == []
    dataset = read_dataset(root)
    total = sum(split.samples for split in dataset.splits.values())
    shards = [shard for split in dataset.splits.values() for shard in split.shards]
    assert (diagnosis.checked.samples, diagnosis.checked.decoded, diagnosis.checked.bad_samples) == (
        total,
        total,
        0,
    )
    assert (diagnosis.checked.shards, diagnosis.checked.bytes) == (
        len(shards),
        sum(one.bytes for one in shards),
    )


def test_a_sample_of_the_samples_is_decoded_spread_over_the_shards(photos):
    damaged = []
    for position in range(5):
        shard = shard_of(photos, "train", position)
        names = [image_name(photos, shard, row) for row in range(shard.samples)]
        damaged += [key for key, _ in names]
        change(
            photos, shard, lambda members, names=names: members | {name: b"no picture" for _, name in names}
        )
    diagnosis = diagnose(photos, sample=12)
    keys = {one.key for one in diagnosis.findings if one.code == "undecodable"}
    assert keys < set(damaged)
    shards = [one.shard for one in diagnosis.findings if one.code == "undecodable"]
    assert len(set(shards)) == 5
    assert diagnosis.checked.decoded == 12
    assert diagnosis.checked.bad_samples == len(keys) in (9, 10)
    assert {one.key for one in diagnose(photos).findings if one.code == "undecodable"} == set(damaged)


NAMES = ("apple", "pear", "fig")
FOREIGN = {
    "numbers": lambda number: {"cls": str(number % 3).encode()},
    "numbers with holes": lambda number: {"cls": str(number % 3 * 5).encode()},
    "names": lambda number: {"txt": NAMES[number % 3].encode()},
    "a field": lambda number: {"json": json.dumps({"id": number + 700, "label": NAMES[number % 3]}).encode()},
    "labels": lambda number: {
        "json": json.dumps(
            {"labels": {"a": number % 2, "b": [None, 1][number % 3 == 0], "c": number % 5 > 1}}
        ).encode()
    },
    "a list": lambda number: {
        "json": json.dumps({"labels": [number % 2, [None, 1][number % 3 == 0], 1 - number % 2]}).encode()
    },
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("scope", ["split", "shard"])
def test_tars_of_others_that_were_indexed_are_in_order_and_a_wrong_label_is_found(kind, scope, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    noise = np.random.default_rng(0)
    for shard in range(3):
        members = []
        for row in range(20):
            number = 20 * shard + row
            key = f"{number}" if scope == "split" else f"{row}"
            pixels = noise.integers(0, 256, (16, 16, 3), np.uint8)
            members += [(f"{key}.png", picture(pixels)), (f"{key}.html", b"<p>")]
            members += [(f"{key}.{one}", data) for one, data in FOREIGN[kind](number).items()]
        write_tar(tars / f"{'val' if shard == 2 else 'train'}-{shard}.tar", members)
    out = tmp_path / "index"
    index_command.index([str(tars), "--out", str(out), "--key-scope", scope, "--workers", "1"])
    hurting = [one for one in diagnose(out).findings if one.kind.severity == HURTS]
    assert {one.code for one in hurting} <= {"class-without-training", "no-label-given"}
    shard = shard_of(out)
    old = index_of(out, shard)
    labels = old.labels.copy()
    labels[7] = (labels[7] + 1) % (3 if labels.ndim == 1 else 2)
    put_index(out, shard, replace(old, labels=labels))
    wrong = [one for one in diagnose(out).findings if one.code == "label-differs"]
    assert [(one.shard, one.key) for one in wrong] == [(shard.name, old.key(7))]


# Files.


def test_a_flipped_bit_in_a_picture_is_found_with_its_key(photos):
    shard = shard_of(photos, "train", 2)
    index = index_of(photos, shard)
    row, column = 4, index.column(("jpg", "png"), 4)
    offset, size = int(index.offset[row, column]), int(index.size[row, column])
    with (photos / shard.name).open("r+b") as tar:
        tar.seek(offset + size // 2)
        byte = tar.read(1)[0]
        tar.seek(offset + size // 2)
        tar.write(bytes([byte ^ 1]))
    diagnosis = diagnose(photos)
    damaged, checksum = sorted((one for one in diagnosis.findings), key=lambda one: one.code)
    assert (damaged.code, damaged.shard, damaged.key, damaged.offset) == (
        "damaged-member",
        shard.name,
        index.key(row),
        offset,
    )
    assert (checksum.code, checksum.shard) == ("shard-checksum", shard.name)
    assert diagnosis.checked.bad_samples == 1


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_tar_that_was_cut_off_is_found_with_the_first_sample_that_is_lost(photos, share):
    shard = shard_of(photos)
    index = index_of(photos, shard)
    end = int((index.offset + index.size).max())
    left = int(end * share)
    os.truncate(photos / shard.name, left)
    (one,) = found(photos, "shard-size")
    lost = [row for row in range(len(index)) if (index.offset[row] + index.size[row]).max() > left]
    assert (one.shard, one.key) == (shard.name, index.key(lost[0]))
    assert f"{left:,} bytes" in one.what
    assert f"{len(lost):,} of its {shard.samples:,} samples" in one.what


def test_a_tar_cut_off_before_it_was_indexed_is_found_by_its_missing_end(photos):
    shard = shard_of(photos)
    index = index_of(photos, shard)
    last = int((index.offset + index.size).max())
    rows = tar_members(photos / shard.name)
    os.truncate(photos / shard.name, last + -last % 512)
    refit(photos, shard, rows=rows)
    (one,) = found(photos, "tar-damaged")
    assert one.shard == shard.name
    assert "end-of-archive" in one.what


def test_a_tar_cut_off_inside_a_member_before_it_was_indexed_is_found_with_its_key(photos):
    shard = shard_of(photos)
    rows = tar_members(photos / shard.name)
    key, members = list(rows.items())[6]
    offset, size, _ = next(place for extension, place in members.items() if extension in ("jpg", "png"))
    os.truncate(photos / shard.name, offset + size // 2)
    kept = dict(list(rows.items())[:6])
    refit(photos, shard, rows=kept)
    (one,) = found(photos, "tar-damaged")
    assert (one.shard, one.key) == (shard.name, key)
    assert "cut off" in one.what


def test_swapped_shards_of_the_same_size_are_found(photos):
    first, second = shard_of(photos, "train", 0), shard_of(photos, "train", 1)
    size = max(first.bytes, second.bytes)
    for shard in (first, second):
        with (photos / shard.name).open("ab") as tar:
            tar.write(bytes(size - shard.bytes))
        refit(photos, shard)
    first, second = shard_of(photos, "train", 0), shard_of(photos, "train", 1)
    assert first.bytes == second.bytes
    (photos / first.name).rename(photos / "aside")
    (photos / second.name).rename(photos / first.name)
    (photos / "aside").rename(photos / second.name)
    findings = diagnose(photos).findings
    assert {one.shard for one in findings if one.code == "shard-checksum"} == {first.name, second.name}
    misplaced = {one.key for one in findings if one.code in ("not-in-tar", "wrong-place")}
    assert misplaced == {*index_of(photos, first).keys, *index_of(photos, second).keys}


def test_a_missing_shard_is_found(photos):
    shard = shard_of(photos, "val")
    (photos / shard.name).unlink()
    (one,) = found(photos, "shard-missing")
    assert one.shard == shard.name


def test_a_folder_in_the_place_of_a_shard_is_found(photos):
    shard = shard_of(photos)
    (photos / shard.name).unlink()
    (photos / shard.name).mkdir()
    (one,) = found(photos, "shard-missing")
    assert one.shard == shard.name


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut"])
def test_a_damaged_index_is_found(photos, damage):
    shard = shard_of(photos)
    path = photos / shard.index_name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damage == "flipped" else content[:-7])
    (one,) = found(photos, "index-damaged")
    assert one.shard == shard.name


def test_an_index_of_keys_that_are_no_text_is_found(photos):
    shard = shard_of(photos)
    index = index_of(photos, shard)
    odd = replace(index, key_bytes=np.full_like(index.key_bytes, 0xFF))
    put_index(photos, shard, odd)
    (one,) = [one for one in diagnose(photos).findings if one.code == "index-damaged"]
    assert (one.shard, "UTF-8" in one.what) == (shard.name, True)


def put_index(root, shard, index):
    digest = write_shard_index(root / shard.index_name, index)
    dataset = read_dataset(root)
    splits = {
        name: replace(
            split,
            shards=tuple(replace(one, index_sha256=digest) if one == shard else one for one in split.shards),
        )
        for name, split in dataset.splits.items()
    }
    write_dataset(root, replace(dataset, splits=splits))


@pytest.mark.parametrize("kind", ["picture", "label"])
def test_a_wrong_place_in_an_index_is_found_with_its_key(photos, kind):
    shard = shard_of(photos)
    rows = tar_members(photos / shard.name)
    key, members = list(rows.items())[3]
    extension = next(one for one in members if (one == "cls") == (kind == "label"))
    offset, size, crc32 = members[extension]
    refit(photos, shard, rows=rows | {key: members | {extension: (offset, size - 1, crc32)}})
    (one,) = found(photos, "wrong-place")
    assert (one.shard, one.key, one.offset) == (shard.name, key, offset)
    assert diagnose(photos).checked.bad_samples == (kind == "picture")


def test_samples_of_a_tar_that_its_index_leaves_out_are_noted(photos):
    shard = shard_of(photos)
    rows = tar_members(photos / shard.name)
    left_out = list(rows)[4]
    refit(photos, shard, rows={key: row for key, row in rows.items() if key != left_out})
    (one,) = found(photos, "not-in-index")
    assert (one.shard, one.key, one.kind.severity) == (shard.name, left_out, NOTE)


def test_keys_with_a_prefix_that_the_tar_does_not_have_are_in_order(photos):
    shard = shard_of(photos)
    rows = {f"{shard.name}/{key}": row for key, row in tar_members(photos / shard.name).items()}
    labels = index_of(photos, shard).labels
    refit(photos, shard, rows=rows, labels=labels)
    assert diagnose(photos).findings == ()


def test_what_is_not_of_the_data_set_is_noted(photos):
    shutil.copy(photos / shard_of(photos).name, photos / "old.tar")
    (photos / ".train-000000.tar.part").write_bytes(b"")
    findings = diagnose(photos).findings
    assert [(one.code, one.kind.severity) for one in findings] == [("leftover", NOTE), ("stranger", NOTE)]
    assert [
        name in one.what for one, name in zip(findings, [".train-000000.tar.part", "old.tar"], strict=True)
    ]


def test_a_shard_that_is_named_twice_is_found(photos):
    dataset = read_dataset(photos)
    train, val = dataset.splits["train"], dataset.splits["val"]
    shards = (*val.shards, train.shards[0])
    write_dataset(photos, replace(dataset, splits={"train": train, "val": replace(val, shards=shards)}))
    findings = diagnose(photos).findings
    (one,) = [one for one in findings if one.code == "shard-named-twice"]
    assert one.shard == train.shards[0].name
    assert len([one for one in findings if one.code == "leak"]) == train.shards[0].samples


@pytest.mark.parametrize("field", ["keys_digest", "class_counts"])
def test_sums_that_do_not_fit_the_indexes_are_found(photos, field):
    dataset = read_dataset(photos)
    train = dataset.splits["train"]
    wrong = {"keys_digest": "0" * 16, "class_counts": (train.class_counts[0] + 1, *train.class_counts[1:])}
    changed = replace(train, **{field: wrong[field]})
    write_dataset(photos, replace(dataset, splits={**dataset.splits, "train": changed}))
    (one,) = found(photos, field.replace("_", "-"))
    assert "train" in one.what


def test_a_damaged_dataset_file_is_a_finding_and_none_at_all_is_wrong_use(photos, tmp_path):
    path = photos / "dataset.json"
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    (one,) = found(photos, "dataset-file")
    assert "cannot use" in one.what
    with pytest.raises(UserError, match="no data set"):
        diagnose(tmp_path)


def test_a_damaged_shard_behind_a_url_is_found_as_in_a_folder(photos, serve, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shard = shard_of(photos)
    key, name = image_name(photos, shard, 2)
    change(photos, shard, lambda members: members | {name: b"no picture"})
    (photos / shard_of(photos, "val").name).write_bytes(bytes(shard_of(photos, "val").bytes))
    near, far = diagnose(photos), diagnose(serve(photos).url)
    assert [one for one in near.findings if one.code == "undecodable"] == [
        one for one in far.findings if one.code == "undecodable"
    ]
    assert {one.key for one in far.findings} >= {key}
    assert {one.shard for one in far.findings if one.code == "shard-missing"} == {
        shard_of(photos, "val").name
    }
    assert {one.shard for one in near.findings if one.code == "shard-checksum"} == {
        shard_of(photos, "val").name
    }


# Samples.


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"no picture at all", "cannot identify"),
        (b"", "cannot identify"),
        (bomb(20_000, 20_000), "20000 x 20000 pixels"),
        (picture(np.zeros((40, 40, 3), np.uint8), "JPEG")[:-200], "cannot decode"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
    ],
)
def test_a_picture_that_does_not_decode_is_found_with_its_key(photos, data, words):
    shard = shard_of(photos, "val")
    key, name = image_name(photos, shard, 1)
    change(photos, shard, lambda members: members | {name: data})
    (one,) = found(photos, "undecodable")
    assert (one.shard, one.key, words in one.what) == (shard.name, key, True)
    assert one.offset == tar_members(photos / shard.name)[key][name.rpartition(".")[2]][0]
    assert diagnose(photos).checked.bad_samples == 1


def test_a_sample_without_a_picture_is_found_with_its_key(photos):
    shard = shard_of(photos)
    key, name = image_name(photos, shard, 2)
    change(photos, shard, lambda members: {one: data for one, data in members.items() if one != name})
    (one,) = found(photos, "unreadable")
    assert (one.shard, one.key) == (shard.name, key)


def test_a_wrong_label_in_the_index_is_found_with_its_key(photos):
    shard = shard_of(photos)
    key, labels = index_of(photos, shard).key(5), index_of(photos, shard).labels.copy()
    labels[5] = (labels[5] + 1) % 3
    refit(photos, shard, labels=labels)
    (one,) = found(photos, "label-differs")
    assert (one.shard, one.key) == (shard.name, key)
    assert f"the index {labels[5]}" in one.what


@pytest.mark.parametrize("value", [-1, 3, 999_999])
def test_a_label_out_of_range_is_found_with_its_key(photos, value):
    shard = shard_of(photos)
    key, labels = index_of(photos, shard).key(5), index_of(photos, shard).labels.copy()
    labels[5] = value
    refit(photos, shard, labels=labels)
    (one,) = found(photos, "label-range")
    assert (one.shard, one.key) == (shard.name, key)
    assert f"the label {value}, allowed are 0 to 2" in one.what


@pytest.mark.parametrize("text", [b"", b"7", b"abc", "٣".encode(), b"9" * 100_000])
def test_a_label_member_that_holds_no_label_is_found_with_its_key(photos, text):
    shard = shard_of(photos)
    key, _ = image_name(photos, shard, 0)
    change(photos, shard, lambda members: members | {f"{key}.cls": text})
    (one,) = found(photos, "label-differs")
    assert (one.shard, one.key) == (shard.name, key)
    assert len(one.what) < 200


def test_a_wrong_label_of_several_is_found_with_its_name(findings):
    shard = shard_of(findings)
    index = index_of(findings, shard)
    labels = index.labels.copy()
    row, column = next((row, column) for row, column in np.argwhere(labels == 0) if row > 2)
    labels[row, column] = 1
    refit(findings, shard, labels=labels)
    (one,) = found(findings, "label-differs")
    assert (one.shard, one.key) == (shard.name, index.key(row))
    assert f"says 0 for {read_dataset(findings).classes[column]!r}, the index 1" in one.what


def test_labels_of_another_kind_are_found(findings):
    shard = shard_of(findings)
    index = index_of(findings, shard)
    put_index(findings, shard, replace(index, labels=np.ascontiguousarray(index.labels[:, :1])))
    (one,) = found(findings, "labels-column")
    assert one.shard == shard.name


def test_a_label_that_nobody_gave_is_found(findings):
    dataset = read_dataset(findings)
    for shard in dataset.splits["train"].shards:
        labels = index_of(findings, shard).labels.copy()
        labels[:, 0] = -1
        rows = tar_members(findings / shard.name)
        keep = {key: {one: place for one, place in row.items() if one != "json"} for key, row in rows.items()}
        refit(findings, shard, labels=labels, rows=keep)
    (one,) = found(findings, "no-label-given")
    assert repr(dataset.classes[0]) in one.what


# Masks.


@pytest.mark.parametrize(
    ("code", "edit", "words"),
    [
        ("mask-value", lambda mask: np.where(mask == mask.max(), 77, mask), "77"),
        ("mask-size", lambda mask: mask[1:], "pixels for an image of"),
        ("mask-unreadable", lambda mask: np.stack([mask, mask // 2, mask], axis=2), "colours"),
        ("mask-unreadable", lambda mask: mask.astype(np.uint16) + 300, "555"),
    ],
)
def test_a_broken_mask_is_found_with_its_key(cells, code, edit, words):
    shard = shard_of(cells)
    key, _ = image_name(cells, shard, 1, kinds=("jpg", "jpeg", "webp", "png"))
    name = next(f"{key}.{one}" for one in tar_members(cells / shard.name)[key] if "mask" in one)

    def edited(members):
        mask = np.asarray(Image.open(io.BytesIO(members[name])).convert("L")).copy()
        mask[0, 0] = 255
        changed = edit(mask)
        return members | {name: picture(changed.astype(np.uint8) if changed.max() < 256 else changed)}

    change(cells, shard, edited)
    diagnosis = diagnose(cells)
    (one,) = [one for one in diagnosis.findings if one.kind.severity == HURTS]
    assert (one.code, one.shard, one.key, words in one.what) == (code, shard.name, key, True)
    assert diagnosis.checked.bad_samples == 1


def test_masks_of_one_class_are_noted(cells):
    before = {one.shard: one for one in found(cells, "one-class-masks")}
    for split in ("train", "val"):
        for position in range(len(read_dataset(cells).splits[split].shards)):
            shard = shard_of(cells, split, position)
            change(cells, shard, lambda members: {name: blank(name, data) for name, data in members.items()})
    dataset = read_dataset(cells)
    diagnosis = diagnose(cells)
    notes = [one for one in diagnosis.findings if one.code == "one-class-masks"]
    assert {one.what.split(" samples")[0] for one in notes} == {
        f"{split.samples} of {split.samples}" for split in dataset.splits.values()
    }
    assert len(before) <= len(notes)
    (missing,) = [one for one in diagnosis.findings if one.code == "class-without-training"]
    assert repr(dataset.classes[1]) in missing.what


def blank(name, data):
    if "mask" not in name:
        return data
    return picture(np.zeros_like(np.asarray(Image.open(io.BytesIO(data)))))


# Doubles.


def test_a_picture_of_train_in_val_is_found_with_both_keys(photos):
    train, val = shard_of(photos, "train", 3), shard_of(photos, "val", 1)
    key, name = image_name(photos, train, 4)
    data = dict(members_of(photos / train.name))
    extension = name.rpartition(".")[2]
    change(
        photos,
        val,
        lambda members: {f"stolen.{extension}": data[name], "stolen.cls": data[f"{key}.cls"], **members},
        labels=np.array([int(data[f"{key}.cls"]), *index_of(photos, val).labels]),
    )
    (one,) = found(photos, "leak")
    assert (one.shard, one.key, one.other) == (val.name, "stolen", key)
    assert train.name in one.what


@pytest.mark.parametrize("same_label", [True, False])
def test_a_picture_that_is_there_twice_is_noted_and_hurts_with_another_label(photos, same_label):
    first, second = shard_of(photos, "train", 0), shard_of(photos, "train", 3)
    key, name = image_name(photos, first, 4)
    data = dict(members_of(photos / first.name))
    label = (int(data[f"{key}.cls"]) + (not same_label)) % 3
    extension = name.rpartition(".")[2]
    change(
        photos,
        second,
        lambda members: {f"again.{extension}": data[name], "again.cls": str(label).encode(), **members},
        labels=np.array([label, *index_of(photos, second).labels]),
    )
    code = "same-picture" if same_label else "same-picture-other-label"
    (one,) = found(photos, code)
    assert (one.shard, one.key, one.other) == (second.name, "again", key)
    assert one.kind.severity == (NOTE if same_label else HURTS)


def test_pictures_of_equal_size_and_checksum_that_differ_are_not_taken_for_one(photos):
    shard = shard_of(photos)
    black, white = (picture(np.full((9, 9, 3), value, np.uint8)) for value in (0, 255))
    size = max(len(black), len(white))
    black, white = (with_checksum(one.ljust(size, b"\0"), 0x12345678) for one in (black, white))
    assert (len(black), zlib.crc32(black)) == (len(white), zlib.crc32(white))
    new = {"black.png": black, "black.cls": b"0", "white.png": white, "white.cls": b"0"}
    old = index_of(photos, shard).labels
    change(photos, shard, lambda members: members | new, labels=np.array([*old, 0, 0]))
    assert diagnose(photos).findings == ()


def test_a_key_that_is_twice_in_a_split_is_found(photos):
    first, second = shard_of(photos, "train", 0), shard_of(photos, "train", 3)
    key = index_of(photos, first).key(2)
    other, _ = image_name(photos, second, 1)
    labels = index_of(photos, second).labels

    def renamed(members):
        return {name.replace(f"{other}.", f"{key}."): data for name, data in members.items()}

    change(photos, second, renamed, labels=labels)
    (one,) = found(photos, "key-twice")
    assert (one.shard, one.key) == (second.name, key)
    assert first.name in one.what


# Balance and sizes.


def test_a_class_without_training_samples_is_found(photos):
    dataset = read_dataset(photos)
    for shard in dataset.splits["train"].shards:
        labels, rows = index_of(photos, shard).labels, tar_members(photos / shard.name)
        write_tar(photos / shard.name, kept_members(photos / shard.name, rows, labels != 1))
        refit(photos, shard, labels=labels[labels != 1])
    (one,) = found(photos, "class-without-training")
    assert repr(dataset.classes[1]) in one.what
    assert "val has" in one.what


def test_a_strong_imbalance_is_noted_with_its_ratio(photos):
    names = {}

    def grown(members):
        for number in range(500):
            pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)
            names[f"more/{number}"] = 0
            members |= {f"more/{number}.png": picture(pixels), f"more/{number}.cls": b"0"}
        return members

    shard = shard_of(photos)
    old = index_of(photos, shard).labels
    change(photos, shard, grown, labels=np.array([*old, *[0] * 500]))
    counts = read_dataset(photos).splits["train"].class_counts
    (one,) = found(photos, "imbalance")
    assert f"{counts[0] / min(counts):.0f} to 1" in one.what
    assert "--data.balance 1" in one.kind.mend


def test_fewer_samples_than_a_global_batch_are_found(photo_dataset):
    samples = read_dataset(photo_dataset).splits["train"].samples
    assert examine(str(photo_dataset), Use(global_batch=samples)).hurts == 0
    (one,) = examine(str(photo_dataset), Use(global_batch=samples + 1)).findings
    assert (one.code, f"{samples} samples" in one.what) == ("too-few-samples", True)


def test_an_empty_split_is_found(photos):
    dataset = read_dataset(photos)
    nothing = Split((), (0,) * len(dataset.classes), "0" * 16)
    write_dataset(photos, replace(dataset, splits={**dataset.splits, "test": nothing}))
    (one,) = found(photos, "empty-split")
    assert "test" in one.what


GIB = 1 << 30


@pytest.mark.parametrize(
    ("sizes", "use", "codes"),
    [
        ([GIB] * 4, USE, []),
        ([GIB, 4 * GIB + 1, GIB, GIB, GIB], USE, ["large-shards"]),
        ([4 << 20] * 100, USE, []),
        ([(4 << 20) - 1] * 100, USE, ["tiny-shards"]),
        ([(4 << 20) - 1] * 99, USE, []),
        ([GIB, 2 * GIB], USE, []),
        ([GIB, 2 * GIB], Use(processes=9), ["uneven-shards"]),
        ([GIB, 2 * GIB], Use(remote=True), ["uneven-shards"]),
        ([GIB, GIB], Use(processes=9, remote=True), []),
        ([1 << 20, 2 << 20], Use(processes=9), []),
    ],
)
def test_shards_too_large_too_small_or_too_unlike_are_noted(sizes, use, codes):
    shards = [Shard(f"{number}.tar", size // 1024, size, "", "") for number, size in enumerate(sizes)]
    split = Split(tuple(shards), (), "")
    nothing = LabelCounts(np.zeros(0, np.int64), np.zeros(0, np.int64))
    noted = Findings()
    check_sizes(SplitReport("train", split, Sums(nothing)), use, noted)
    assert [one.code for one in noted.all()] == codes
    assert all(one.kind.severity == NOTE for one in noted.all())


def test_a_class_that_val_lacks_and_a_label_that_is_always_one_are_noted(photos, findings):
    for position in range(len(read_dataset(photos).splits["val"].shards)):
        shard = shard_of(photos, "val", position)
        labels, rows = index_of(photos, shard).labels, tar_members(photos / shard.name)
        write_tar(photos / shard.name, kept_members(photos / shard.name, rows, labels != 2))
        refit(photos, shard, labels=labels[labels != 2])
    (one,) = found(photos, "class-without-validation")
    assert "val" in one.what
    assert repr(read_dataset(photos).classes[2]) in one.what
    for shard in read_dataset(findings).splits["train"].shards:
        labels = np.abs(index_of(findings, shard).labels)
        rows = tar_members(findings / shard.name)
        keep = {key: {one: place for one, place in row.items() if one != "json"} for key, row in rows.items()}
        refit(findings, shard, labels=np.maximum(labels, [[1, 0, 0]]), rows=keep)
    assert repr(read_dataset(findings).classes[0]) in found(findings, "one-sided-label")[0].what


def test_mean_and_deviation_that_are_far_off_are_noted(photos):
    dataset = read_dataset(photos)
    write_dataset(photos, replace(dataset, mean=tuple(value + 0.04 for value in dataset.mean)))
    assert diagnose(photos).findings == ()
    write_dataset(photos, replace(dataset, mean=tuple(value + 0.06 for value in dataset.mean)))
    (one,) = found(photos, "statistics")
    assert one.kind.severity == NOTE


def test_the_pixel_statistics_are_those_of_all_training_pixels(photos):
    """Against a plain computation, so that the limit above is one of the pixels and not of an error."""
    dataset = read_dataset(photos)
    pixels = [
        decode(data, mode="RGB").reshape(-1, 3) / 255
        for shard in dataset.splits["train"].shards
        for name, data in members_of(photos / shard.name)
        if not name.endswith("cls")
    ]
    mean, std = np.concatenate(pixels).mean(axis=0), np.concatenate(pixels).std(axis=0)
    assert np.allclose(dataset.mean, mean, atol=0.01)
    up = np.array([0, 0, 1])
    write_dataset(photos, replace(dataset, mean=tuple(mean + up * 0.0499), std=tuple(std - up * 0.0499)))
    assert diagnose(photos).findings == ()
    write_dataset(photos, replace(dataset, mean=tuple(mean + up * 0.0501), std=tuple(std - up * 0.0501)))
    assert [one.code for one in diagnose(photos).findings] == ["statistics"] * 2


# What pictures have in common.


@pytest.mark.parametrize(
    ("code", "make"),
    [
        ("progressive", lambda pixels: picture(pixels, "JPEG", progressive=True)),
        ("sixteen-bit", lambda pixels: picture(pixels[:, :, 0].astype(np.uint16) * 256)),
        ("turned", lambda pixels: picture(pixels, "JPEG", exif=turned())),
        ("tiny-pictures", lambda pixels: picture(pixels[:3])),
        ("thin-pictures", lambda pixels: picture(np.repeat(pixels[:9], 30, axis=1))),
        ("large-pictures", lambda pixels: picture(np.resize(pixels, (1025, 1025, 3)))),
        (
            "animated",
            lambda pixels: picture(
                pixels, "WEBP", save_all=True, append_images=[Image.fromarray(255 - pixels)], lossless=True
            ),
        ),
    ],
)
def test_what_slows_or_surprises_is_noted_with_the_first_key(photos, code, make):
    shard = shard_of(photos)
    key, name = image_name(photos, shard, 1)
    pixels = np.ascontiguousarray(decode(dict(members_of(photos / shard.name))[name], mode="RGB"))
    stem = name.rpartition(".")[0]
    data = make(pixels)
    extension = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}[data[:2]]

    def edited(members):
        return {
            f"{stem}.{extension}" if one == name else one: data if one == name else old
            for one, old in members.items()
        }

    change(photos, shard, edited)
    samples = read_dataset(photos).splits["train"].samples
    (one,) = found(photos, code)
    assert (one.shard, one.key, one.kind.severity) == (shard.name, key, NOTE)
    assert f"1 of {samples} samples in train" in one.what


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def test_a_colour_data_set_of_grey_pictures_is_noted_and_one_grey_picture_is_not(photos):
    def grey(data):
        return picture(np.asarray(Image.open(io.BytesIO(data)).convert("L")))

    shard = shard_of(photos)
    _, name = image_name(photos, shard, 0, kinds=("png",))
    change(photos, shard, lambda members: members | {name: grey(members[name])})
    assert diagnose(photos).findings == ()
    for split, parts in read_dataset(photos).splits.items():
        for position in range(len(parts.shards)):
            shard = shard_of(photos, split, position)
            pictures = [
                (one if one.endswith("cls") else one.replace(".jpg", ".png"), data)
                for one, data in members_of(photos / shard.name)
            ]
            write_tar(
                photos / shard.name,
                [(one, data if one.endswith("cls") else grey(data)) for one, data in pictures],
            )
            refit(photos, shard)
    assert {one.what.split(" are")[0] for one in found(photos, "all-grey")} == {
        "48 of 48 samples in train",
        "12 of 12 samples in val",
    }


def test_colours_in_a_grey_data_set_are_noted(photos):
    dataset = read_dataset(photos)
    grey = replace(dataset, image_mode="L", mean=dataset.mean[:1], std=dataset.std[:1])
    write_dataset(photos, grey)
    notes = found(photos, "coloured")
    assert [one.what.split(" samples")[0] for one in notes] == [
        f"{split.samples} of {split.samples}" for split in dataset.splits.values()
    ]


# The command.


def test_the_command_says_good_news_and_exits_with_0(photo_dataset, lockstep):
    done = lockstep("doctor", photo_dataset, "--global-batch", 16, "--workers", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing that hurts was found" in done.stdout
    dataset = read_dataset(photo_dataset)
    samples = sum(split.samples for split in dataset.splits.values())
    shards = sum(len(split.shards) for split in dataset.splits.values())
    assert done.stdout.splitlines()[-1].startswith(f"{samples} samples in {shards} shards checked in ")


def test_the_findings_are_the_same_with_one_and_two_workers_and_in_json(photos, lockstep):
    for position in range(4):
        shard = shard_of(photos, "train", position)
        _, name = image_name(photos, shard, position)
        change(photos, shard, lambda members, name=name: members | {name: b"no picture"})
    (photos / shard_of(photos, "val").name).unlink()
    words = ("doctor", photos, "--json", "--global-batch", 16)
    one, two = (lockstep(*words, "--workers", workers) for workers in (1, 2))
    assert (one.returncode, one.stderr) == (two.returncode, two.stderr) == (1, "")
    assert one.stdout == two.stdout
    content = json.loads(one.stdout)
    assert content["dataset"] == str(photos)
    assert content["checked"]["bad_samples"] == 4
    codes = [finding["code"] for finding in content["findings"]]
    assert sorted(codes) == ["shard-missing", *["undecodable"] * 4]
    fields = {"severity", "code", "shard", "key", "offset", "what", "mend"}
    assert all(fields < finding.keys() for finding in content["findings"])
    said = lockstep(*words[:2], *words[3:], "--workers", 2)
    assert said.returncode == 1
    assert "training would skip 4 of" in said.stdout
    assert "5 findings that hurt" in said.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["missing"], "DATA"),
        (["DATASET", "another"], "USAGE"),
        (["DATASET", "--sample", "0"], "USAGE"),
        (["DATASET", "--samples", "3"], "USAGE"),
    ],
)
def test_wrong_use_exits_with_2(words, code, photo_dataset, lockstep, tmp_path):
    named = [str(photo_dataset) if word == "DATASET" else word for word in words]
    done = lockstep("doctor", *named, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"FATAL code={code} " in done.stderr
    assert "Traceback" not in done.stderr


def workers_of(process):
    """Linux only, as what is tested."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            words = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == process and b"spawn_main" in words:
            found.append(int(path.parent.name))
    return found


@pytest.fixture
def many(photo_dataset, tmp_path):
    """A data set that takes seconds to examine: the same shards under many names."""
    root = shutil.copytree(photo_dataset, tmp_path / "many")
    dataset = read_dataset(root)
    shards = []
    for number in range(300):
        for shard in dataset.splits["train"].shards:
            copy = replace(shard, name=f"{number}-{shard.name}")
            os.link(root / shard.name, root / copy.name)
            os.link(root / shard.index_name, root / copy.index_name)
            shards.append(copy)
    write_dataset(
        root, replace(dataset, splits={"train": replace(dataset.splits["train"], shards=tuple(shards))})
    )
    return root


@pytest.mark.parametrize(
    ("victim", "sign", "code"),
    [("worker", signal.SIGKILL, 2), ("command", signal.SIGINT, 130), ("command", signal.SIGKILL, -9)],
)
def test_a_kill_ends_the_command_and_all_its_processes(many, victim, sign, code):
    words = [sys.executable, "-m", "launch", "doctor", str(many), "--workers", "2"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        deadline = time.monotonic() + 20
        while len(workers := workers_of(command.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(workers[0] if victim == "worker" else command.pid, sign)
        out, err = command.communicate(timeout=20)
        assert (command.returncode, out) == (code, "")
    if victim == "worker":
        assert re.search(
            r"error: a worker process was killed from outside \(SIGKILL\)( at .*\.tar)?, with 2 of them", err
        )
    assert "Traceback" not in err
    deadline = time.monotonic() + 5
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [worker for worker in workers if alive(worker)] == []


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# The list of findings.


def test_findings_of_a_kind_and_shard_are_bounded_and_the_rest_is_counted():
    findings = Findings()
    for number in range(LIMIT + 5):
        findings.add(Finding("undecodable", "what", "a.tar", f"{number}"))
    findings.add(Finding("undecodable", "what", "b.tar", "one"))
    kept = findings.all()
    assert len(kept) == LIMIT + 2
    assert sum(one.count for one in kept) == LIMIT + 6
    assert (kept[-1].shard, kept[-1].count, kept[-1].key) == ("a.tar", 5, "")


def test_ten_of_a_kind_are_shown_and_the_rest_is_counted_and_lines_fit_the_terminal():
    findings = [
        Finding("undecodable", "words " * 30, "a.tar", f"key \x1b[2J{number}", 7) for number in range(40)
    ]
    findings.append(Finding("undecodable", "12 more like these", "a.tar", count=12))
    lines = [
        line
        for one in report_lines(Diagnosis("d", Checked(60, 1), tuple(findings)), width=80, seconds=3725)
        for line in one.splitlines()
    ]
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if "a.tar 'key" in line]) == 10
    assert "    and 42 more" in lines
    assert lines[-1] == "60 samples in 1 shard checked in 1 h 2 min 5 s: 52 findings that hurt"
    assert all(line.isprintable() for line in lines)


def test_every_kind_says_how_it_is_mended():
    for code, kind in KINDS.items():
        assert re.fullmatch("[a-z-]+", code)
        assert kind.severity in (HURTS, NOTE)
        assert kind.mend
