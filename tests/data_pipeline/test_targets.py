from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.shard_index import MISSING
from data_pipeline.targets import (
    MAX_CLASSES,
    MAX_LABELS,
    class_name,
    class_number,
    field_class,
    field_labels,
    json_record,
    labels_field,
    parse_class,
    parse_labels,
)

CLASSES = ("cat", "dog", "7")


@given(st.integers(0, 999), st.sampled_from([b"", b" ", b"\n", b"\r\n\t"]))
def test_a_class_number_is_read_with_space_around_it(number, space):
    assert class_number(space + b"%d" % number + space, 1000) == number
    with pytest.raises(ValueError, match=rf"the label is '{number}', allowed are the class numbers 0 to"):
        class_number(b"%d" % number, number)


BAD = [b"-1", b"3", b"999999", b"", b"abc", b"1.5", b"NaN", "\u0663".encode(), b"1_0", b"0x1", b"+1", b"1 1"]


@pytest.mark.parametrize("data", [*BAD, b"9" * 10_000_000, b" " * 100 + b"1", b"\xff", b"1\0"])
def test_what_is_no_class_number_is_refused_at_once_with_value_and_range(data):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="allowed are the class numbers 0 to 2") as caught:
        class_number(data, 3)
    assert time.perf_counter() - start < 0.1
    assert len(str(caught.value)) < 300
    assert repr(data[:10].decode("utf-8", "backslashreplace"))[1:-1] in str(caught.value)


@given(st.binary(max_size=60))
def test_whatever_the_bytes_a_class_number_is_in_range_or_refused(data):
    try:
        number = class_number(data, 50)
    except ValueError:
        return
    assert 0 <= number < 50
    assert data.strip().decode() == str(number).rjust(len(data.strip()), "0")


def test_a_class_name_is_short_text():
    assert class_name("  größe\n".encode()) == "größe"
    for data, words in (
        (b"", "empty"),
        (b" \n", "empty"),
        (b"x" * 1001, "1001 bytes"),
        (b"\xff\xfe", "UTF-8"),
    ):
        with pytest.raises(ValueError, match=words):
            class_name(data)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"[1]", b"3", b'"x"', b"null", b"\xff", b"[" * 100_000, b"{}" + b" " * (1 << 20)),
        *(b'{"a":' * 50_000, b'{"label": ' + b"9" * 5000 + b"}"),
    ],
)
def test_what_is_no_json_object_is_refused_at_once(data):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="JSON"):
        json_record(data)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("value", [-1, 3, 10**30, 1.0, True, None, [1], {"a": 1}, "", "x" * 2000])
def test_a_field_that_is_no_class_is_refused(value):
    with pytest.raises(ValueError, match="label"):
        field_class({"label": value}, "label", 3)


def test_a_field_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="no field 'label', it has 'caption', 'url'"):
        field_class({"caption": 1, "url": 2}, "label", 3)
    with pytest.raises(ValueError, match=r"none of the fields 'a', 'b', it has 'c'"):
        field_labels({"c": 1}, ("a", "b"))


def test_classes_are_read_by_name_and_by_number():
    for data, kind in ((b"1", "number"), (b"dog", "name"), (b"1", "name"), (b'{"f": "dog"}', "field")):
        assert parse_class(data, kind, ("f",), CLASSES) == "dog"
    assert parse_class(b'{"f": 1}', "field", ("f",), CLASSES) == "dog"
    assert parse_class(b"7", "name", (), CLASSES) == "7"  # a name before it is a number
    assert parse_class(b"007", "number", (), ()) == "7"
    assert parse_class(b'{"f": 12}', "field", ("f",), ()) == "12"
    for data, kind in ((b"3", "number"), (b"cow", "name"), (b"9", "name"), (b'{"f": 3}', "field")):
        with pytest.raises(ValueError, match="allowed are"):
            parse_class(data, kind, ("f",), CLASSES)


def test_without_names_class_numbers_end_somewhere():
    assert parse_class(b"%d" % (MAX_CLASSES - 1), "number", (), ()) == str(MAX_CLASSES - 1)
    with pytest.raises(ValueError, match=f"0 to {MAX_CLASSES - 1}"):
        parse_class(b"%d" % MAX_CLASSES, "number", (), ())


def test_labels_are_one_zero_or_missing():
    record = {"a": 1, "b": 0, "c": None, "d": True, "e": False, "f": 1.0}
    data = json.dumps({**record, "labels": record, "list": list(record.values())}).encode()
    expected = {"a": 1, "b": 0, "c": MISSING, "d": 1, "e": 0, "f": 1}
    assert parse_labels(data, "fields", tuple(record), ()) == expected
    assert parse_labels(data, "labels", ("labels",), ()) == expected
    assert list(parse_labels(data, "labels", ("list",), ()).items()) == [
        (str(place), value) for place, value in enumerate(expected.values())
    ]
    assert parse_labels(data, "labels", ("list",), tuple(record)) == expected
    assert parse_labels(data, "fields", ("a", "not there"), ()) == {"a": 1, "not there": MISSING}


@pytest.mark.parametrize("value", [2, -1, "1", "", [1], {}, float("nan"), 0.5, 10**400])
def test_any_other_label_is_refused_with_its_name(value):
    with pytest.raises(ValueError, match=r"label 'a' is .* allowed are 0, 1 and null"):
        labels_field({"labels": {"a": value}}, "labels")


@pytest.mark.parametrize("value", [None, 1, "a", {}, [], dict.fromkeys(map(str, range(MAX_LABELS + 1)), 0)])
def test_labels_that_are_no_object_or_list_of_them_are_refused(value):
    with pytest.raises(ValueError, match="field 'labels'"):
        labels_field({"labels": value}, "labels")


def test_labels_that_nobody_named_are_refused():
    with pytest.raises(ValueError, match="it has the label 'cow', allowed are 'cat', 'dog', '7'"):
        parse_labels(b'{"labels": {"cow": 1}}', "labels", ("labels",), CLASSES)
    with pytest.raises(ValueError, match="holds 2 labels, for 3 names"):
        parse_labels(b'{"labels": [1, 0]}', "labels", ("labels",), CLASSES)
