from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.fault import UserError
from data_pipeline.tar_headers import BLOCK, pax_records
from data_pipeline.tars import index_one, member_parts, tar_members

PLAIN = [("a.jpg", b"\xff\xd8 one"), ("a.cls", b"0"), ("b.jpg", b"x" * 3000), ("b.cls", b"1")]
NAMES = [
    "deep/er/0001",
    "ünïcödé/größe",
    "e\u0301 decomposed",
    "\u05e9\u05dc\u05d5\u05dd",
    "🦊 with spaces",
    "n" * 250,
    "long/" * 60 + "x" * 200,
    "../../etc/passwd",
    "/absolute/key",
    "./dotted/key",
    "back\\slash 'quote' \"double\"",
    "new\nline",
]


def header(name, size=0, **fields):
    entry = tarfile.TarInfo(name)
    entry.size = size
    for field, value in fields.items():
        setattr(entry, field, value)
    return entry


def tar_bytes(members, form=tarfile.PAX_FORMAT, **options):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, **options) as tar:
        for name, data in members:
            tar.addfile(header(name, len(data)), io.BytesIO(data))
    return file.getvalue()


def raw_header(name, size, kind=b"0", **numbers):
    """One block, with any number in the size field that its base-256 form can hold, and a right checksum."""
    block = bytearray(header(name, type=kind).tobuf(tarfile.GNU_FORMAT)[-BLOCK:])
    block[124:136] = numbers.get("field") or (b"\x80" if size >= 0 else b"\xff") + (size % 256**11).to_bytes(
        11, "big"
    )
    return summed(block)


def summed(block):
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(2 * BLOCK)


def padded(data):
    return data + bytes(-len(data) % BLOCK)


def put(tmp_path, data, name="shard.tar"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def refused(path, *, code="DATA", seconds=1.0):
    """The error of a tar, which comes at once and without much memory."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(UserError) as caught:
            index_one(path)
        assert time.perf_counter() - start < seconds
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert caught.value.code == code
    assert caught.value.mend
    assert path.name in caught.value.what
    assert caught.value.place["shard"] == path.name
    assert isinstance(caught.value.place["offset"], int)
    assert len(caught.value.what) < 2000
    return caught.value


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_member_is_found_where_tarfile_finds_it_whatever_its_name(tmp_path, form):
    names = NAMES if form != tarfile.USTAR_FORMAT else [name for name in NAMES if len(name) < 90]
    members = [(f"{name}.{kind}", os.urandom(7 * place)) for place, name in enumerate(names) for kind in "xy"]
    path = put(tmp_path, tar_bytes(members, form))
    found = index_one(path)
    with tarfile.open(path) as tar:
        expected = {one.name: (one.offset_data, one.size) for one in tar}
    contents = dict(members)
    flat = {f"{key}.{end}": place for key, row in found.rows.items() for end, place in row.items()}
    assert {name: place[:2] for name, place in flat.items()} == expected
    assert {name: place[2] for name, place in flat.items()} == {
        name: zlib.crc32(data) for name, data in contents.items()
    }
    assert list(found.rows) == names
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.size == path.stat().st_size


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7"])
def test_tars_of_the_tar_program_are_read(tmp_path, form):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for number in range(4):
        (folder / "sub" / f"{number}.jpg").write_bytes(bytes([number]) * 1000 * number)
        (folder / "sub" / f"{number}.cls").write_bytes(b"1")
    if form in ("gnu", "pax"):
        (folder / f"{'ö' * 100}.jpg").write_bytes(b"long")
    made = tmp_path / "made.tar"
    label = ["--label=volume"] if form == "gnu" else []
    words = ["tar", f"--format={form}", *label, "--sort=name", "-cf", made, "-C", tmp_path, "pictures"]
    subprocess.run(list(map(str, words)), check=True)
    rows = index_one(made).rows
    data = made.read_bytes()
    for number in range(4):
        offset, size, crc32 = rows[f"pictures/sub/{number}"]["jpg"]
        assert data[offset : offset + size] == bytes([number]) * 1000 * number
        assert crc32 == zlib.crc32(data[offset : offset + size])
    assert len(rows) == 4 + (form in ("gnu", "pax"))


def test_members_of_a_sample_are_grouped_wherever_they_stand(tmp_path):
    order = ["b.cls", "a.jpg", "c.jpg", "a.cls", "b.jpg", "c.cls", "a.json"]
    rows = tar_members(put(tmp_path, tar_bytes([(name, name.encode()) for name in order])))
    assert list(rows) == ["b", "a", "c"]
    assert set(rows["a"]) == {"jpg", "cls", "json"}
    assert set(rows["b"]) == set(rows["c"]) == {"jpg", "cls"}


def test_upper_case_and_dotted_extensions_stay_as_they_are(tmp_path):
    rows = tar_members(
        put(tmp_path, tar_bytes([("a.JPG", b"1"), ("a.mask.png", b"2"), ("a.v1/b.jpg", b"3")]))
    )
    assert rows.keys() == {"a", "a.v1/b"}
    assert rows["a"].keys() == {"JPG", "mask.png"}


def test_a_name_that_is_not_utf8_is_kept_with_its_odd_bytes_written_out(tmp_path):
    data = tar_bytes([("k\udce9y.jpg", b"1")], tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape")
    (key,) = tar_members(put(tmp_path, data))
    assert key == "k\\xe9y"
    assert key.encode()


def test_what_belongs_to_no_sample_is_counted_by_its_reason(tmp_path):
    litter = [
        "__MACOSX/._a.jpg",
        "._b.jpg",
        ".DS_Store",
        "x/.cache/c.jpg",
        "README",
        "Thumbs.db",
        "pax_global_header",
    ]
    opened = ["a.pkl", "a.pyd", "b.pth", "a.npy", "a.x.PKL", "c.cbor"]
    found = index_one(put(tmp_path, tar_bytes([(name, b"1") for name in ["a.jpg", *litter, *opened]])))
    assert found.rows.keys() == {"a"}
    assert found.rows["a"].keys() == {"jpg"}
    assert found.ignored == {
        "hidden": 5,
        "without an extension": 2,
        **{f"unsupported .{one}": 1 for one in ("cbor", "npy", "pth", "pyd")},
        "unsupported .pkl": 2,
    }


def test_folders_and_global_headers_are_passed_over(tmp_path):
    file = io.BytesIO()
    with tarfile.open(
        fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "abc"}
    ) as tar:
        tar.addfile(header("folder", type=tarfile.DIRTYPE))
        tar.addfile(header("folder/a.jpg", 3), io.BytesIO(b"123"))
    path = put(tmp_path, file.getvalue())
    (place,) = tar_members(path)["folder/a"].values()
    assert path.read_bytes()[place[0] : place[0] + 3] == b"123"


def test_an_archive_without_members_has_no_samples(tmp_path):
    assert tar_members(put(tmp_path, bytes(10240))) == {}


def test_a_visitor_sees_what_it_wants_and_no_more(tmp_path):
    seen = []
    path = put(tmp_path, tar_bytes([*PLAIN, ("c.jpg", b"late")]))
    index_one(
        path,
        wanted=lambda extension: 2 if extension == "jpg" else 0,
        visit=lambda key, extension, data: seen.append((key, extension, data)),
        at_most=2,
    )
    assert seen == [("a", "jpg", b"\xff\xd8"), ("b", "jpg", b"xx")]


def test_what_a_visitor_refuses_is_told_with_its_place(tmp_path):
    def visit(_key, _extension, _data):
        raise ValueError("no number")

    path = put(tmp_path, tar_bytes(PLAIN))
    with pytest.raises(UserError, match=r"'shard.tar' member 'a.cls': no number") as caught:
        index_one(path, wanted=lambda extension: 10 * (extension == "cls"), visit=visit)
    assert caught.value.place == {"shard": "shard.tar", "member": "a.cls", "offset": 3 * BLOCK}


WHOLE = tar_bytes(PLAIN)
LAST_HEADER = WHOLE.rindex(b"b.cls")
BODY = WHOLE.index(b"x" * 3000)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty: 0 bytes"),
        (WHOLE[: BODY + 700], "cut off inside member 'b.jpg': 700 of its 3000 bytes"),
        (WHOLE[:LAST_HEADER], "no end-of-archive"),
        (WHOLE[: LAST_HEADER + 100], "cut off inside a header, behind 3 members"),
        (WHOLE[: LAST_HEADER + 2 * BLOCK], "no end-of-archive"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"\n <html>" + b"x" * 1000, "web page"),
        (gzip.compress(WHOLE), "gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs"),
        (b"nothing like a tar " * 100, "is no tar"),
        (b"short", "is no tar"),
        (WHOLE[:LAST_HEADER] + b"\x01" * BLOCK + END, "damaged header behind 3 members"),
        (WHOLE + tar_bytes(PLAIN[:2]), "goes on behind its end"),
        (tar_bytes([*PLAIN, ("a.jpg", b"2")]), "holds member 'a.jpg' twice"),
        (tar_bytes([(f"img.{number}.jpg", b"1") for number in range(70)]), "more than 64 kinds of members"),
    ],
)
def test_a_tar_that_is_cut_off_or_none_is_refused_with_its_own_words(tmp_path, data, words):
    assert words in refused(put(tmp_path, data)).what


def test_a_zip_is_refused_as_what_it_is_but_not_a_tar_whose_first_name_looks_like_one(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("a.jpg", b"1" * 1000)
    assert "zip archive" in refused(put(tmp_path, file.getvalue())).what
    for name in ("PK\x03\x04.jpg", "BZh.jpg", "<b>.jpg"):
        assert len(tar_members(put(tmp_path, tar_bytes([(name, b"1")])))) == 1


@pytest.mark.parametrize("size", [2**60, -1, -512, 2**87, 10**6, -(2**80)])
def test_a_member_of_an_impossible_size_is_refused_at_once(tmp_path, size):
    data = raw_header("a.jpg", size) + b"x" * BLOCK + END
    assert "'a.jpg' says that it has" in refused(put(tmp_path, data)).what
    octal = raw_header("a.jpg", 0, field=b"77777777777\0") + END
    assert "8589934591 bytes" in refused(put(tmp_path, octal)).what


def pax_member(payload, kind=tarfile.XHDTYPE, size=None):
    head = raw_header("pax", len(payload) if size is None else size, kind)
    return head + padded(payload) + raw_header("a.jpg", 0) + END


def record(name, value):
    body = b" " + name + b"=" + value + b"\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


LONG = tarfile.GNUTYPE_LONGNAME
BOMBS = {
    "a million records": lambda: pax_member(b"".join(record(b"k%d" % one, b"v") for one in range(1_000_000))),
    "many small records": lambda: pax_member(b"".join(record(b"k%d" % one, b"v") for one in range(40_000))),
    "quadratic in some versions of tarfile": lambda: pax_member(b"1" * 1_000_000),
    "a megabyte a record in some versions of tarfile": lambda: pax_member(b"2 " * 400_000 + b"="),
    "a record of no length": lambda: pax_member(b"0 k=v\n"),
    "a record without an end": lambda: pax_member(b"6 k=v"),
    "a record of endless length": lambda: pax_member(b"99999999999999999999 k=v\n"),
    "a size of thousands of digits": lambda: pax_member(record(b"size", b"9" * 5000)),
    "a negative size": lambda: pax_member(record(b"size", b"-5")),
    "one name for all": lambda: pax_member(record(b"path", b"all.jpg"), tarfile.XGLTYPE),
    "an endless header": lambda: pax_member(b"", size=2**60),
    "a header of negative size": lambda: pax_member(b"", size=-512),
    "cut off in its records": lambda: raw_header("pax", 3000, tarfile.XHDTYPE) + b"30 k=",
    "records without a member": lambda: raw_header("p", 8, tarfile.XHDTYPE) + padded(b"8 k=val\n") + END,
    "a chain of long names": lambda: (raw_header("@", 600, LONG) + padded(b"n" * 600)) * 20_000 + END,
    "a chain of huge names": lambda: (raw_header("@", 1 << 18, LONG) + b"n" * (1 << 18)) * 12 + END,
    "a name without a member": lambda: raw_header("@", 5, LONG) + padded(b"n.jpg") + END,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_and_broken_extended_headers_are_refused_at_once(tmp_path, kind):
    refused(put(tmp_path, BOMBS[kind]()))


def test_many_global_headers_cost_no_memory(tmp_path):
    data = b"".join(
        raw_header("g", 512, tarfile.XGLTYPE) + record(b"c%05d" % number, b"x" * 496)[:512].ljust(512)
        for number in range(100)
    )
    refused(put(tmp_path, data + END))
    fine = raw_header("g", 9, tarfile.XGLTYPE) + padded(b"9 k=four\n") + raw_header("a.jpg", 0)
    assert tar_members(put(tmp_path, fine + END)).keys() == {"a"}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.BLKTYPE, "device"),
        (tarfile.FIFOTYPE, "named pipe"),
        (tarfile.GNUTYPE_SPARSE, "sparse"),
    ],
)
def test_links_devices_pipes_and_sparse_files_are_unsafe(tmp_path, kind, words):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(header("a.cls", 1), io.BytesIO(b"0"))
        tar.addfile(header("a.jpg", type=kind, linkname="/etc/passwd"))
    error = refused(put(tmp_path, file.getvalue()), code="UNSAFE")
    assert words in error.what
    assert error.place["member"] == "a.jpg"
    assert error.place["offset"] == 2 * BLOCK


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
def test_sparse_members_of_the_tar_program_are_unsafe(tmp_path, version):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"middle")
    made = tmp_path / "made.tar"
    words = ["tar", "--format=pax", f"--sparse-version={version}", "-Scf", made, "-C", tmp_path, "a.jpg"]
    subprocess.run(list(map(str, words)), check=True)
    assert "sparse" in refused(made, code="UNSAFE").what


def test_a_member_of_an_unknown_kind_is_refused(tmp_path):
    assert "unknown kind b'M'" in refused(put(tmp_path, raw_header("a.jpg", 0, b"M") + END)).what


def test_a_shard_that_is_not_there_a_folder_or_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    for name, words in (
        ("none.tar", "cannot open"),
        ("folder.tar", "is no file"),
        ("pipe.tar", "is no file"),
    ):
        with pytest.raises(UserError, match=words):
            tar_members(tmp_path / name)


def test_nothing_is_written_whatever_the_names(tmp_path):
    inside = tmp_path / "deep" / "inside"
    inside.mkdir(parents=True)
    path = put(inside, tar_bytes([("../../canary.jpg", b"1"), (f"{tmp_path}/canary.cls", b"1")]))
    tar_members(path)
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["deep", "inside", "shard.tar"]


FUZZED = [tar_bytes(PLAIN), tar_bytes([(f"{NAMES[6]}.jpg", b"1"), ("ü.cls", b"0")])]
FUZZED += [tar_bytes([(f"{NAMES[6]}.jpg", b"12"), ("b.jpg", b"0" * 600)], tarfile.GNU_FORMAT)]


def only_user_errors(path):
    start = time.perf_counter()
    found = None
    with suppress(UserError):
        found = index_one(path)
    assert time.perf_counter() - start < 1
    places = [place for row in found.rows.values() for place in row.values()] if found else []
    size = path.stat().st_size
    assert all(offset >= BLOCK and offset + length <= size for offset, length, _ in places)


def test_a_tar_with_flipped_bytes_ends_in_nothing_but_a_user_error(tmp_path):
    numbers = np.random.default_rng(0)
    path = tmp_path / "fuzzed.tar"
    for turn in range(2400):
        data = bytearray(FUZZED[turn % 3])
        first = int(numbers.integers(0, len(data) // BLOCK - 2)) * BLOCK
        for place in numbers.integers(0, BLOCK, numbers.integers(1, 4)):
            data[first + place] = numbers.integers(0, 256)
        if turn % 2:  # past the checksum, into what the header says
            data[first : first + BLOCK] = summed(data[first : first + BLOCK])
        path.write_bytes(data)
        only_user_errors(path)


FIELDS = {"size": (124, 136), "type": (156, 157), "name": (0, 100), "prefix": (345, 500), "mode": (100, 108)}


@settings(max_examples=300, deadline=None)
@given(
    field=st.sampled_from(sorted(FIELDS)),
    value=st.binary(min_size=1, max_size=155) | st.sampled_from([bytes([one]) for one in range(256)]),
    which=st.integers(0, 2),
    block=st.integers(0, 8),
)
def test_any_value_in_any_field_ends_in_nothing_but_a_user_error(
    tmp_path_factory, field, value, which, block
):
    data = bytearray(FUZZED[which])
    start = min(block, len(data) // BLOCK - 3) * BLOCK
    first, end = FIELDS[field]
    data[start + first : start + end] = value[: end - first].ljust(end - first, b"\0")
    data[start : start + BLOCK] = summed(data[start : start + BLOCK])
    path = tmp_path_factory.getbasetemp() / "field.tar"
    path.write_bytes(data)
    only_user_errors(path)


@given(
    st.dictionaries(
        st.binary(min_size=1, max_size=20).filter(lambda one: b"=" not in one), st.binary(max_size=300)
    )
)
def test_pax_records_come_back_as_they_were_written(records):
    assert pax_records(b"".join(record(name, value) for name, value in records.items())) == records


@given(st.text(max_size=60))
def test_keys_and_extensions_make_the_name_again(name):
    parts = member_parts(name)
    if not isinstance(parts, str):
        key, extension = parts
        assert f"{key}.{extension}" == name
        assert "." not in key.rpartition("/")[2]
        assert "/" not in extension
