"""Reads the labels of tars that others wrote: class numbers, class names, labels that are 1, 0 or missing.

Only `lockstep index` parses members; training reads the labels from the index. Every function takes the bytes
of one member and raises ValueError, which names the value and what is allowed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from data_pipeline.shard_index import MISSING

MAX_CLASSES = 100_000  # where nobody gave names: a larger number is a mistake, or no class at all
LONGEST_NAME = 1000  # bytes of a class's name: what is longer is a caption
MAX_LABELS = 10_000  # of a multilabel sample
MAX_MEMBER = 1 << 20  # bytes of a member with labels
# ASCII digits only, and few: int() also takes '٣' and '1_0', and needs quadratic time for megabytes of them.
NUMBER = re.compile("[0-9]{1,9}")


def parse_class(data: bytes, kind: str, fields: tuple[str, ...], classes: tuple[str, ...]) -> str:
    """The class of a member of a kind (member_kinds.TASKS): its name, or its number without `classes`."""
    limit = len(classes) or MAX_CLASSES
    if kind == "number":
        number = class_number(data, limit)
        return classes[number] if classes else str(number)
    value = field_class(json_record(data), fields[0], limit) if kind == "field" else class_name(data)
    if isinstance(value, int):
        return classes[value] if classes else str(value)
    return _known(value, classes) if classes else value


def parse_labels(data: bytes, kind: str, fields: tuple[str, ...], classes: tuple[str, ...]) -> dict[str, int]:
    """The labels of a member of a kind (member_kinds.TASKS) by their names: 1, 0, or MISSING."""
    record = json_record(data)
    labels = field_labels(record, fields) if kind == "fields" else labels_field(record, fields[0], classes)
    if classes and (unknown := [name for name in labels if name not in classes]):
        raise ValueError(f"it has the label {_json(unknown[0])}, allowed are {_listed(list(classes))}")
    return labels


def _known(name: str, classes: tuple[str, ...]) -> str:
    if name in classes:
        return name
    if NUMBER.fullmatch(name) and int(name) < len(classes):
        return classes[int(name)]
    what = f"the label is {_json(name)}, allowed are {_listed(list(classes))}"
    raise ValueError(f"{what} and the class numbers 0 to {len(classes) - 1}")


def class_number(data: bytes, classes: int) -> int:
    """The class number of a member that holds nothing else, 0 <= number < classes."""
    number = data.strip().decode("ascii", "replace") if len(data) < 40 else ""
    if not NUMBER.fullmatch(number) or int(number) >= classes:
        shown = repr(data[:40].decode("utf-8", "backslashreplace"))
        more = f"… ({len(data)} bytes)" if len(data) > 40 else ""
        raise ValueError(f"the label is {shown}{more}, allowed are the class numbers 0 to {classes - 1}")
    return int(number)


def class_name(data: bytes) -> str:
    """The class of a member that holds its name and nothing else."""
    if len(data) > LONGEST_NAME:
        raise ValueError(f"the label is {len(data)} bytes long, a class name has at most {LONGEST_NAME}")
    try:
        name = data.decode().strip()
    except UnicodeDecodeError:
        raise ValueError(f"the label is {data[:40]!r}, which is not UTF-8") from None
    if not name:
        raise ValueError("the label is empty, it must be the name of a class")
    return name


def json_record(data: bytes) -> dict[str, Any]:
    """The object of a JSON member."""
    if len(data) > MAX_MEMBER:
        raise ValueError(f"it has {len(data)} bytes, JSON with labels has at most {MAX_MEMBER}")
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON that can be read: {error or 'nested too deep'}") from None
    if not isinstance(record, dict):
        raise ValueError('it is JSON, but no object of fields: {"label": …}')
    return record


def field_class(record: dict[str, Any], field: str, classes: int) -> int | str:
    """The class in a field of a JSON object: its number, 0 <= number < classes, or its name."""
    if field not in record:
        raise ValueError(f"it has no field {field!r}, it has {_listed(list(record))}")
    value = record[field]
    if isinstance(value, str):
        return class_name(value.encode("utf-8", "backslashreplace"))
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < classes:
        return value
    allowed = f"a class name or the class numbers 0 to {classes - 1}"
    raise ValueError(f"field {field!r} is {_json(value)}, allowed are {allowed}")


def field_labels(record: dict[str, Any], fields: tuple[str, ...]) -> dict[str, int]:
    """The labels in these fields of a JSON object: 1, 0, or MISSING for null and for what is not there."""
    if not any(name in record for name in fields):
        raise ValueError(f"it has none of the fields {_listed(list(fields))}, it has {_listed(list(record))}")
    return {name: label(name, record.get(name)) for name in fields}


def labels_field(record: dict[str, Any], field: str, classes: tuple[str, ...] = ()) -> dict[str, int]:
    """The labels in one field of a JSON object: an object of names, or a list in the order of `classes`."""
    value = record.get(field)
    if isinstance(value, list):
        if classes and len(value) != len(classes):
            raise ValueError(f"field {field!r} holds {len(value)} labels, for {len(classes)} names")
        value = dict(zip(classes or map(str, range(len(value))), value, strict=True))
    if not isinstance(value, dict):
        raise ValueError(
            f"field {field!r} is {_json(value)}, it must be an object or a list of 0, 1 and null"
        )
    if not 0 < len(value) <= MAX_LABELS:
        raise ValueError(f"field {field!r} holds {len(value)} labels, allowed are 1 to {MAX_LABELS}")
    return {name: label(name, one) for name, one in value.items()}


def from_list(names: Collection[str]) -> bool:
    """Whether these are the names that the labels of a list get: their places."""
    return set(names) == set(map(str, range(len(names))))


def label(name: str, value: Any) -> int:
    """One label: 1, 0, or MISSING."""
    if value is None:
        return MISSING
    if value not in (0, 1):  # true and 1.0 equal 1
        raise ValueError(f"label {name!r} is {_json(value)}, allowed are 0, 1 and null (for a missing one)")
    return int(value)


def _json(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}…" if len(text) > 60 else text


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(repr(name[:40]) for name in names[:10]) + more if names else "no field at all"
