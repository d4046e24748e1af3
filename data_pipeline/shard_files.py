"""Finds the tars that a command line names, and says which split each of them belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import glob, has_magic
from pathlib import Path
from typing import TypeVar

from data_pipeline.fault import UserError
from data_pipeline.urls import local_path, scheme_of

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
SPLIT_NAME = re.compile("[A-Za-z0-9_-]{1,64}")
MAX_SHARDS = 1_000_000  # of one brace range: {0..999999999999} would fill the memory
BRACES = re.compile(r"\{([^{}]*)\}")
LOCAL = re.compile("file:(//(localhost)?)?/(?!/)", re.IGNORECASE)
RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")

Found = TypeVar("Found", str, Path)


@dataclass(frozen=True)
class SplitRule:
    """Shards whose file name matches the pattern belong to the split."""

    split: str
    pattern: str


def split_rule(text: str) -> SplitRule:
    """The rule in NAME=GLOB; USAGE where it is none."""
    name, equals, pattern = text.partition("=")
    if not equals or not SPLIT_NAME.fullmatch(name) or not pattern:
        raise UserError(
            f"--split {text!r} is not NAME=GLOB",
            mend="as in --split 'val=shard-0009*.tar'",
            code="USAGE",
        )
    return SplitRule(name, pattern)


def find_shards(words: list[str]) -> list[Path]:
    """The tars that folders, files, globs and brace ranges name, sorted by name; all lie in one folder.

    USAGE where there are none or they lie apart, DATA where one is not there, UNSAFE for what is no path.
    """
    paths = {path for word in words for path in _named(word)}
    if others := sorted(path.name for path in paths if path.suffix != ".tar"):
        raise UserError(
            f"'{others[0]}' is not named as a tar",
            mend="shards are uncompressed tars: NAME.tar",
            code="USAGE",
        )
    folders = sorted({str(path.parent) for path in paths})
    if len(folders) > 1:
        raise UserError(
            f"the shards lie in {len(folders)} folders, such as '{folders[0]}' and '{folders[1]}'",
            mend="put them into one folder, or make a data set of each folder",
            code="USAGE",
        )
    for path in sorted(paths):
        if not path.resolve().is_relative_to(path.parent.resolve()):
            raise UserError(
                f"'{path}' is a link to a file in another folder",
                mend="name the tars where they lie; --out DEST puts the index elsewhere",
                code="UNSAFE",
                place={"shard": path.name},
            )
    return sorted(paths)


def _named(word: str) -> list[Path]:
    plain = _plain(word)
    if Path(plain).is_dir():
        paths = sorted(path for path in Path(plain).iterdir() if _is_shard(path))
        return [path.absolute() for path in _some(paths, f"the folder '{plain}' holds no tar")]
    if Path(plain).exists():
        return [Path(plain).absolute()]
    found: list[str] = []
    for one in expand_braces(plain):
        _check_no_scheme(one)
        if has_magic(one):
            found += _some(
                sorted(glob(one)),  # noqa: PTH207 (Path.glob takes no absolute pattern)
                f"nothing matches '{one}'",
            )
        elif Path(one).exists():
            found.append(one)
        else:
            raise UserError(f"there is no shard '{one}'", mend="check the path", place={"shard": one})
    return [Path(one).absolute() for one in found]


def _is_shard(path: Path) -> bool:
    return path.suffix == ".tar" and not path.name.startswith(".")


def _some(found: list[Found], what: str) -> list[Found]:
    if not found:
        raise UserError(
            what, mend="give a folder of tars, tars, a glob or a range such as train-{000..003}.tar"
        )
    return found


def _plain(word: str) -> str:
    """A path; UNSAFE for a URL of any scheme that is not a file's. Nothing here ever reaches a shell."""
    if scheme_of(word) != "file":
        _check_no_scheme(word)
    elif not LOCAL.match(word):
        raise UserError(f"{word!r} names no file of this machine", mend="write file:///FOLDER", code="UNSAFE")
    return str(local_path(word))


def _check_no_scheme(word: str) -> None:
    if scheme := scheme_of(word):
        raise UserError(
            f"{word!r} would be read through '{scheme}:', which is not done",
            mend=f"give tars on this machine (download them first); a file of this name is ./{word}",
            code="UNSAFE",
        )


def expand_braces(text: str) -> Iterator[str]:
    """Every text that {000..003} and {a,b} stand for, in order; braces of another kind stay as they are."""
    for found in BRACES.finditer(text):
        parts = _alternatives(found[1])
        if parts is not None:
            for part in parts:
                for rest in expand_braces(text[found.end() :]):
                    yield text[: found.start()] + part + rest
            return
    yield text


def _alternatives(inside: str) -> Iterator[str] | None:
    if "," in inside:
        return iter(inside.split(","))
    found = RANGE.fullmatch(inside)
    if found is None:
        return None
    first, last = int(found[1]), int(found[2])
    if not 0 <= last - first < MAX_SHARDS:
        raise UserError(
            f"the range {{{inside}}} stands for {max(last - first + 1, 0):,} shards",
            mend=f"a range goes upwards and stands for {MAX_SHARDS:,} at most",
            code="USAGE",
        )
    ends = found[1], found[2]
    width = max(map(len, ends)) if any(len(end) > 1 and end[0] == "0" for end in ends) else 1
    return (f"{number:0{width}d}" for number in range(first, last + 1))


def assign_splits(
    shards: list[Path], rules: list[SplitRule], *, val_shards: int = 0
) -> dict[str, list[Path]]:
    """Split -> its shards in order: by the rules, else by a word of the file name, else train.

    With `val_shards` the last ones of train are held out as val. USAGE where a rule matches nothing, or a
    shard matches rules of two splits.
    """
    splits: dict[str, list[Path]] = {}
    for shard in shards:
        named = sorted({rule.split for rule in rules if fnmatchcase(shard.name, rule.pattern)})
        if len(named) > 1:
            raise UserError(
                f"'{shard.name}' belongs to two splits: {' and '.join(named)}",
                mend="let the patterns of --split match each shard once",
                code="USAGE",
            )
        splits.setdefault(named[0] if named else split_of(shard.name), []).append(shard)
    for rule in rules:
        if not any(fnmatchcase(shard.name, rule.pattern) for shard in shards):
            names = ", ".join(shard.name for shard in shards[:3])
            raise UserError(
                f"--split {rule.split}={rule.pattern} matches no shard",
                mend=f"the pattern is of file names; there are {names} …",
                code="USAGE",
            )
    if val_shards:
        _hold_out(splits, val_shards)
    order = {name: place for place, name in enumerate(("train", "val", "test"))}
    return {name: splits[name] for name in sorted(splits, key=lambda name: (order.get(name, 3), name))}


def split_of(name: str) -> str:
    """The split that a file name tells, by its first word that is one: imagenet-validation-003.tar is val."""
    words = re.split("[^a-z]+", name.lower().removesuffix(".tar"))
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")


def _hold_out(splits: dict[str, list[Path]], count: int) -> None:
    train = splits.get("train", [])
    if "val" in splits or count >= len(train):
        held = (
            f"val has {len(splits['val'])} shards already" if "val" in splits else f"train has {len(train)}"
        )
        raise UserError(
            f"--val-shards {count} cannot be held out: {held}",
            mend="hold out fewer shards than train has, where there is no val split yet",
            code="USAGE",
        )
    splits["train"], splits["val"] = train[:-count], train[-count:]
