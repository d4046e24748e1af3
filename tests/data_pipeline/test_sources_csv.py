import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.fault import UserError
from data_pipeline.sources import SourceOptions, find_source


@pytest.fixture(scope="module")
def pictures(photographs, tmp_path_factory):
    """Forty crops of photographs, 00.jpg to 39.jpg, and in deep/ three more."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "deep").mkdir()
    for number in range(40):
        crop = np.ascontiguousarray(photographs["cat"][number : number + 24, :30])
        Image.fromarray(crop).save(root / f"{number:02d}.jpg")
    for name in ("x", "y", "z"):
        Image.fromarray(crop).save(root / "deep" / f"{name}.png")
    return root


@pytest.fixture
def table(pictures, tmp_path):
    """Writes a CSV and finds its source."""

    def find(text, *, name="labels.csv", **options):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return find_source(path, SourceOptions(**{"images": pictures, **options}))

    return find


def refusal(find, text, **options):
    with pytest.raises(UserError) as caught:
        find(text, **options)
    return caught.value


def lines(count, label):
    return "".join(f"{number:02d}.jpg,{label(number)}\n" for number in range(count))


def targets(source):
    return {item.key: item.target for item in source.items}


def test_a_column_of_names_makes_classes_sorted_by_name(table, pictures):
    source = table("image,label\n" + lines(10, lambda number: "dog" if number % 2 else "cat"))
    assert (source.task, source.classes) == ("multiclass", ("cat", "dog"))
    assert [item.key for item in source.items] == [f"{number:02d}" for number in range(10)]
    assert [item.target for item in source.items] == [0, 1] * 5
    assert source.items[3].path == pictures / "03.jpg"
    assert sum(item.split == "val" for item in source.items) == 2
    assert (
        source.kind
        == "a CSV, pictures by column 'image', class by column 'label', 20% of each class held out for val"
    )


@pytest.mark.parametrize("write", [str, "{}.0".format, "{:03d}".format])
def test_whole_numbers_make_classes_sorted_by_size(table, write):
    source = table("image,label\n" + lines(6, lambda number: write((2, 10, 9)[number % 3])))
    assert source.classes == ("2", "9", "10")
    assert [item.target for item in source.items] == [0, 2, 1] * 2


def test_classes_that_are_named_decide_the_order_or_name_the_numbers(table):
    text = "image,label\n" + lines(4, lambda number: "ab"[number % 2])
    assert [item.target for item in table(text, classes=("b", "a")).items] == [1, 0, 1, 0]
    numbers = "image,label\n" + lines(4, lambda number: number % 2)
    assert table(numbers, classes=("benign", "malignant")).classes == ("benign", "malignant")
    assert [item.target for item in table(numbers, classes=("1", "0")).items] == [1, 0, 1, 0]
    assert "line 3" in refusal(table, text, classes=("a", "c")).what


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_any_usual_way_to_write_a_csv_is_read(table, delimiter, start, end):
    rows = [
        ("image", "label"),
        ("00.jpg", '"a, b; c"'),
        ("01.jpg", '"a ""d"""'),
        ("", ""),
        ("02.jpg", "größe"),
    ]
    text = end.join(delimiter.join(row) for row in rows) + end
    source = table(start + text.encode())
    assert source.classes == ('a "d"', "a, b; c", "größe")


def test_columns_of_zeros_and_ones_are_labels_and_a_missing_one_stays_missing(table):
    source = table(
        "Image Index,Patient Age,Edema,Mass\n"
        "00.jpg,52,1,0\n01.jpg,7,1.0,\n02.jpg,33,0.0,nan\n03.jpg,41,-1,NA\n04.jpg,88,-1.0,1\n"
    )
    assert (source.task, source.classes) == ("multilabel", ("Edema", "Mass"))
    expected = [(1, 0), (1, -1), (0, -1), (-1, -1), (-1, 1)]
    assert [item.target for item in source.items] == expected


def test_columns_can_be_named(table):
    text = "picture file,a,b,label,fold\n00.jpg,1,0,x,train\n01.jpg,0,1,y,TEST\n"
    options = {"image_column": "picture file", "split_column": "fold"}
    source = table(text, label_columns=("b", "a"), **options)
    assert (source.classes, targets(source)) == (("b", "a"), {"00": (0, 1), "01": (1, 0)})
    assert [item.split for item in source.items] == ["train", "test"]
    assert table(text, label_columns=("a", "b"), classes=("b", "a"), **options).classes == ("b", "a")
    assert refusal(table, text, label_columns=("c",)).code == "USAGE"
    assert refusal(table, text, label_columns=("a", "b"), classes=("a", "z"), **options).code == "USAGE"
    assert refusal(table, text, label_columns=("a",), image_column="a").code == "USAGE"


@pytest.mark.parametrize("write", ["{:02d}", "{:02d}.jpg", "./{:02d}.jpg", "{root}/{:02d}.jpg"])
def test_a_picture_is_found_by_its_path_with_or_without_extension(table, pictures, write):
    rows = "".join(f"{write.format(number, root=pictures)},{number % 2}\n" for number in range(8))
    source = table(f"what,label\n{rows}")
    assert [item.path for item in source.items] == [pictures / f"{number:02d}.jpg" for number in range(8)]


def test_a_bare_name_is_found_in_folders_below_and_its_key_keeps_them(table, pictures):
    source = table("image,label\nx.png,a\ny,b\ndeep/z.png,a\n")
    assert [item.key for item in source.items] == ["deep/x", "deep/y", "deep/z"]


def test_a_name_that_several_pictures_have_is_an_error(photographs, tmp_path):
    for name in ("a/1.png", "b/1.png", "2.png", "2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(photographs["cat"][:9, :9]).save(tmp_path / name)
    (tmp_path / "labels.csv").write_text("image,label\n1.png,a\n2,b\n")
    with pytest.raises(UserError) as caught:
        find_source(tmp_path / "labels.csv", SourceOptions())
    first, second = caught.value.what.splitlines()
    assert "line 2: '1.png' may be 'a/1.png' or 'b/1.png'" in first
    assert "line 3: '2' may be '2.jpg' or '2.png'" in second


@pytest.mark.parametrize(
    "path", ["../secret.png", "deep/../../secret.png", "/etc/passwd", "..", "{root}/../s.png"]
)
def test_a_path_out_of_the_folder_is_unsafe(table, pictures, path):
    error = refusal(table, f"image,label\n00.jpg,a\n{path.format(root=pictures)},b\n")
    assert error.code == "UNSAFE"
    assert "line 3" in error.what


def test_pictures_that_are_not_there_are_listed_with_their_lines(table):
    rows = "".join(f"no{number}.jpg,a\n" for number in range(15))
    error = refusal(table, f"image,label\n00.jpg,a\n{rows}")
    told = error.what.splitlines()
    assert error.code == "DATA"
    assert len(told) == 11
    assert "line 3: no picture 'no0.jpg' in" in told[0]
    assert "5 more" in told[-1]


BAD = [
    ("image,label\n00.jpg,a\n01.jpg,\n", ["line 3", "column 'label'", "no label"]),
    ("image,label\n00.jpg,a\n01.jpg,-1.0\n", ["line 3", "no label ('-1.0')"]),
    (
        "image,a,b\n00.jpg,1,0\n01.jpg,maybe,1\n02.jpg,1,1\n",
        ["line 3", "column 'a'", "'maybe' is neither 1 nor 0"],
    ),
    ("image,a,b\n00.jpg,1,0\n01.jpg,2,1\n02.jpg,1,1\n", ["line 3", "'2' is neither"]),
    ("image,a,b\n00.jpg,1,0\n01.jpg,٣,1\n02.jpg,1,1\n", ["line 3", "'٣' is neither"]),
    ("image,label\n00.jpg,1\n01.jpg,٣\n02.jpg,2\n", ["line 3", "'٣' is none of the 2 classes"]),
    ("image,label\n00.jpg,1\n01.jpg,1.5\n02.jpg,2\n", ["line 3", "'1.5' is none"]),
    ("image,label\n00.jpg,1\n01.jpg,-2\n02.jpg,2\n", ["line 3", "'-2' is none"]),
    (
        "image,label\n00.jpg,0.25\n01.jpg,1e5\n02.jpg,a\n",
        ["line 2", "'0.25' is none", "line 3", "'1e5' is none"],
    ),
    ("image,label\n00.jpg,1\n01.jpg,12345678901\n02.jpg,2\n", ["line 3", "is none of"]),
    (f"image,label\n00.jpg,a\n01.jpg,{'x' * 5000}\n", ["line 3", "5,000 letters"]),
    ("image,label\n00.jpg,a\n01.jpg,b\n00.jpg,b\n", ["line 4: '00.jpg' is there already, in line 2"]),
    ("image,label\n00.jpg,a\n00,b\n", ["line 3: '00.jpg' is there already, in line 2"]),
    ("image,label,split\n00.jpg,a,train\n01.jpg,b,dev\n", ["line 3", "'dev' is no split"]),
    ("image,label,patient\n00.jpg,a,P1\n01.jpg,b,\n", ["line 3", "column 'patient': no group"]),
    ("image,label\n00.jpg,a\n01.jpg,b,c\n", ["line 3", "3 values, but the header names 2"]),
    ("image,label\n00.jpg,a\n01.jpg\n", ["line 3", "1 values"]),
    ('image,label\n00.jpg,"a\nb"\n01.jpg,\n', ["line 4", "no label"]),
    ('image,label\n00.jpg,a\n01.jpg,"b\n02.jpg,c\n', ["line 3", "unexpected end of data"]),
    (f"image,label\n00.jpg,a\n01.jpg,{'9' * 200_000}\n", ["line 3", "field larger than field limit"]),
    (b"image,label\n00.jpg,a\n01.jpg,caf\xe9\n", ["line 3", "not UTF-8"]),
    ("image,label\n00.jpg,a\n01.jpg,b\n".encode("utf-16"), ["line 1", "not UTF-8"]),
    ("", ["is empty"]),
    ("image,label\n", ["has no rows"]),
    ("00.jpg,a\n01.jpg,b\n", ["has no header", "'00.jpg'"]),
    ("what,label\nfoo,a\nbar,b\n", ["no column", "names pictures"]),
    ("image,age,sex\n00.jpg,a,x\n01.jpg,b,y\n", ["no column", "known to be the label"]),
    ("image,label,label\n00.jpg,a,b\n01.jpg,b,c\n", []),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_what_is_wrong_in_a_csv_is_told_with_its_line_column_and_value(table, text, words):
    if not words:
        assert table(text).classes == ("a", "b")
        return
    error = refusal(table, text)
    assert error.code == "DATA"
    assert [word for word in words if word not in error.what] == []
    assert error.mend
    if "line" in words[0]:
        assert error.place["line"] == int(words[0].split()[1].rstrip(":"))


def test_a_column_of_splits_is_followed_in_any_case(table):
    names = ["train", "Val", "VALID", "validation", " test "]
    source = table("image,label,split\n" + lines(5, lambda number: f"a,{names[number]}"))
    assert [item.split for item in source.items] == ["train", "val", "val", "val", "test"]
    ignored = table("image,label,split\n" + lines(5, lambda number: f"a,{names[number]}"), split_column="")
    assert [item.split for item in ignored.items].count("val") == 1


def test_a_group_in_two_splits_is_named(table):
    text = "image,label,split,Patient ID\n" + lines(6, lambda n: f"a,{'train' if n < 4 else 'val'},P{n % 3}")
    told = refusal(table, text).what.splitlines()
    assert len(told) == 2
    assert "line 6: column 'Patient ID': 'P1' is in val, but was in train in line 3" in told[0]
    assert len(table(text, group_column="").items) == 6


@settings(max_examples=40, deadline=None)
@given(
    order=st.permutations(range(40)), size=st.integers(1, 9), several=st.booleans(), seed=st.integers(0, 5)
)
def test_groups_stay_whole_and_the_order_of_rows_changes_nothing(pictures, tmp_path_factory, **drawn):
    order, size, several = drawn["order"], drawn["size"], drawn["several"]

    def row(number):
        labels = f"{number % 2},{number % 3 // 2},{number % 5 // 4}" if several else "abc"[number % 3]
        return f"{number:02d}.jpg,{labels},P{number // size}\n"

    header = "image,p,q,r,patient_id\n" if several else "image,label,patient_id\n"
    found = []
    for rows in (range(40), order):
        path = tmp_path_factory.mktemp("table") / "labels.csv"
        path.write_text(header + "".join(map(row, rows)))
        options = SourceOptions(images=pictures, seed=drawn["seed"], val_fraction=0.3)
        found.append(find_source(path, options))
    assert found[0] == found[1]
    splits = {}
    for item in found[0].items:
        splits.setdefault(int(item.key) // size, set()).add(item.split)
    assert all(len(one) == 1 for one in splits.values())
    assert {item.split for item in found[0].items} == {"train", "val"}


def test_the_pictures_lie_beside_the_csv_unless_a_folder_is_named(photo_folder, photo_table):
    source = find_source(photo_table, SourceOptions(images=photo_folder))
    assert source.classes == ("bright", "wide", "red")
    assert len(source.items) == 60
    with pytest.raises(UserError, match=r"no picture 'astronaut/00\.png'"):
        find_source(photo_table, SourceOptions())
    with pytest.raises(UserError, match="no folder"):
        find_source(photo_table, SourceOptions(images=photo_folder / "nowhere"))


def test_names_that_are_not_utf8_in_the_folder_do_no_harm(photographs, tmp_path):
    Image.fromarray(photographs["cat"][:9, :9]).save(tmp_path / "a.png")
    os.link(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    (tmp_path / "labels.csv").write_text("image,label\na.png,x\n")
    assert [item.key for item in find_source(tmp_path / "labels.csv", SourceOptions()).items] == ["a"]
