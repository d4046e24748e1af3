"""Finds out what the members of foreign tars are: which is the image, and which the target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.fault import UserError
from data_pipeline.index import IMAGE_EXTENSIONS
from data_pipeline.target_kinds import Seen, find_target, is_mask, last_part, unclear
from data_pipeline.tars import index_one

LOOKED_AT = 500  # samples of the first shard, and as many of the last
SMALL = 1 << 16  # bytes of a member that may be a label
TASKS = {
    "number": "multiclass",
    "name": "multiclass",
    "field": "multiclass",
    "fields": "multilabel",
    "labels": "multilabel",
    "mask": "segmentation",
}


@dataclass(frozen=True)
class Wish:
    """What the user says of the members; what is empty is detected."""

    image: tuple[str, ...] = ()
    target: str = ""
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """How a sample is read: its image members (none named: any picture), its target and what is in that."""

    target: str
    kind: str  # one of TASKS
    image: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()  # other members of the first samples

    @property
    def task(self) -> str:
        """The task that the targets are for."""
        return TASKS[self.kind]

    def is_image(self, extension: str) -> bool:
        """Whether a member with this extension is the sample's image."""
        if self.image:
            return extension in self.image
        return extension != self.target and extension.lower() in IMAGE_EXTENSIONS

    def in_words(self) -> str:
        """What was found, in one line."""
        names = ", ".join(map(repr, self.fields))
        what = {
            "number": "class numbers",
            "name": "class names",
            "field": f"classes in the field {names} of the JSON",
            "fields": f"labels in the fields {names} of the JSON",
            "labels": f"labels in the field {names} of the JSON",
            "mask": "masks",
        }[self.kind]
        image = ", ".join(f".{one}" for one in self.seen if self.is_image(one))
        others = ", ".join(f".{one}" for one in self.seen if not self.is_image(one))
        unused = f"; not used: {others}" if others else ""
        return f"{self.task}: the image is {image}, the target .{self.target} ({what}){unused}"


def detect(shards: list[Path], wish: Wish) -> Reading:
    """How to read shards, by the first samples of the first and the last; DATA where it is not clear."""
    seen = _look(shards)
    extensions = seen.extensions()
    if not extensions:
        raise UserError(
            f"'{shards[0].name}' holds no samples",
            mend="members are named KEY.EXTENSION: 000123.jpg, 000123.cls",
            place={"shard": shards[0].name},
        )
    for names in (wish.image, (wish.target,) if wish.target else ()):
        if names and not set(names) & set(extensions):
            raise unclear(f"there is no member .{' or .'.join(names)} in the first samples", extensions)
    target = find_target(seen, extensions, image=wish.image, target=wish.target, fields=wish.fields)
    image = wish.image or _image(extensions, target.extension)
    if target.extension in image:
        raise unclear(f".{target.extension} cannot be both the image and the target", extensions)
    others = tuple(one for one in extensions if one != target.extension)
    return Reading(target.extension, target.kind, image, target.fields, others)


def _look(shards: list[Path]) -> Seen:
    seen = Seen()

    def wanted(extension: str) -> int:
        return 0 if extension.lower() in IMAGE_EXTENSIONS else SMALL + 1

    def visit(_key: str, extension: str, data: bytes) -> None:
        if len(data) <= SMALL:
            seen.bodies.setdefault(extension, []).append(data)

    for shard in dict.fromkeys((shards[0], shards[-1])):
        rows = index_one(shard, wanted=wanted, visit=visit, at_most=LOOKED_AT).rows
        seen.samples.extend(set(row) for row in rows.values())
    return seen


def _image(extensions: list[str], target: str) -> tuple[str, ...]:
    """None named where plain pictures are there; else the one other member that ends as a picture does."""
    others = [one for one in extensions if one != target]
    if any(one.lower() in IMAGE_EXTENSIONS for one in others):
        return ()
    named = [one for one in others if last_part(one) in IMAGE_EXTENSIONS and not is_mask(one)]
    if len(named) != 1:
        found = "none" if not named else f"{len(named)}: " + ", ".join(f".{one}" for one in named)
        raise unclear(f"which member is the image? There is {found} that could be", extensions)
    return (named[0],)
