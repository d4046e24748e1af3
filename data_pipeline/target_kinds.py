"""Finds out which member of foreign tars is the target, and what it holds: a number, a name, JSON, a mask."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data_pipeline.fault import UserError
from data_pipeline.targets import json_record

NUMBERS = ("cls", "class", "label", "index", "inx")
TEXTS = ("txt", "text", "name", "classname", "class_name", "caption")
MASK = re.compile(
    r"(.*[._-])?(mask|masks|seg|segmentation|segm|gt|annotation|labelmap|label)s?\d*"
    r"(\.(png|bmp|tif|tiff|webp|pgm|ppm))?",
    re.IGNORECASE,
)
MASK_LAST = ("png", "bmp", "tif", "tiff", "webp", "pgm", "ppm", "mask", "seg")
LABEL_FIELDS = ("label", "class", "cls", "target", "class_id", "label_id", "category", "class_name")


class Target(NamedTuple):
    """A target member: its extension, its kind (member_kinds.TASKS) and its fields."""

    extension: str
    kind: str
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """Members of the first samples: extensions of each, and the bytes of small ones by extension."""

    samples: list[set[str]] = field(default_factory=list)
    bodies: dict[str, list[bytes]] = field(default_factory=dict)

    def extensions(self) -> list[str]:
        """The extensions, those of most samples first."""
        counts = Counter(one for sample in self.samples for one in sample)
        return sorted(counts, key=lambda one: (-counts[one], one))

    def records(self, extension: str) -> list[dict[str, Any]]:
        """What can be read of JSON members; those that cannot are reported when all are indexed."""
        records = []
        for body in self.bodies.get(extension, []):
            try:
                records.append(json_record(body))
            except ValueError:
                continue
        return records


def find_target(
    seen: Seen, extensions: list[str], *, image: tuple[str, ...], target: str, fields: tuple[str, ...]
) -> Target:
    """The target that the user names, else the one that is detected; DATA where none is clear."""
    if target:
        return _read_as(seen, target, fields)
    if fields:
        found = [one for one in extensions if last_part(one) == "json"]
        if not found:
            raise unclear("--field needs JSON, and there is no member .json", extensions)
        return _read_as(seen, found[0], fields)
    candidates = [one for one in extensions if one not in image]
    for likely in (is_mask, _is_number, lambda one: _label_field(seen, one)):
        if found := [one for one in candidates if likely(one)]:
            return _read_as(seen, found[0], ())
    if mask := _mask_beside_image(seen, candidates):
        return Target(mask, "mask")
    for one in candidates:
        if last_part(one) in TEXTS and _are_names(seen.bodies.get(one, [])):
            return Target(one, "name")
    raise unclear(_no_labels(seen, candidates), extensions)


def _read_as(seen: Seen, extension: str, fields: tuple[str, ...]) -> Target:
    if last_part(extension) == "json" or fields:
        if len(fields) > 1:
            return Target(extension, "fields", fields)
        one = fields[0] if fields else _label_field(seen, extension)
        if not one:
            raise unclear(_no_labels(seen, [extension]), [extension])
        nested = any(isinstance(record.get(one), dict | list) for record in seen.records(extension))
        return Target(extension, "labels" if nested else "field", (one,))
    if is_mask(extension) or last_part(extension) in MASK_LAST:
        return Target(extension, "mask")
    bodies = seen.bodies.get(extension, [])
    digits = bool(bodies) and all(body.strip().isdigit() for body in bodies)
    return Target(extension, "number" if _is_number(extension) or digits else "name")


def is_mask(extension: str) -> bool:
    """Whether the extension says that the member is a mask: mask.png, seg.png, mask."""
    plain = extension.lower() in NUMBERS
    return not plain and MASK.fullmatch(extension) is not None and last_part(extension) in MASK_LAST


def _is_number(extension: str) -> bool:
    return extension.lower() in NUMBERS


def _label_field(seen: Seen, extension: str) -> str:
    """The field of JSON members that holds labels; an empty string where none does."""
    if last_part(extension) != "json":
        return ""
    records = seen.records(extension)
    if any(_is_labels(record.get("labels")) for record in records):
        return "labels"
    plain = (one for one in LABEL_FIELDS if any(isinstance(record.get(one), int | str) for record in records))
    return next(plain, "")


def _is_labels(value: Any) -> bool:
    values = list(value.values()) if isinstance(value, dict) else value
    return isinstance(values, list) and bool(values) and all(one is None or one in (0, 1) for one in values)


def _mask_beside_image(seen: Seen, candidates: list[str]) -> str:
    """Where every sample has a JPEG and a PNG and nothing holds labels, the PNG is a mask."""
    pngs = [one for one in candidates if one.lower() == "png"]
    jpegs = [one for one in candidates if one.lower() in ("jpg", "jpeg")]
    if pngs and jpegs and all(pngs[0] in sample and set(jpegs) & sample for sample in seen.samples):
        return pngs[0]
    return ""


def _are_names(bodies: list[bytes]) -> bool:
    """Class names are few, short and repeat; captions do not."""
    different = set(bodies)
    short = all(len(body) <= 40 and len(body.split()) <= 4 for body in different)
    return bool(bodies) and (len(different) * 4 <= len(bodies) or (short and len(different) < len(bodies)))


def _no_labels(seen: Seen, candidates: list[str]) -> str:
    jsons = [one for one in candidates if last_part(one) == "json"]
    fields = sorted({name for one in jsons for record in seen.records(one) for name in record})
    has = f"; the JSON has the fields {', '.join(fields[:20])}" if fields else ""
    texts = [one for one in candidates if last_part(one) in TEXTS]
    captions = f"; .{texts[0]} looks like captions, which are no classes" if texts else ""
    return f"no member holds labels{has}{captions}"


def last_part(extension: str) -> str:
    return extension.rpartition(".")[2].lower()


def unclear(what: str, extensions: list[str]) -> UserError:
    members = ", ".join(f".{one}" for one in extensions[:12])
    return UserError(
        f"{what} (members of the first samples: {members})",
        mend="name the members: --image EXT[,EXT], --target EXT, and --field NAME[,NAME] of a JSON member",
    )
