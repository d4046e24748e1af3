"""Says where every member of a tar lies, by the sample that it belongs to, in one pass over its bytes.

Members of one sample may stand in any order, and between those of others.
"""

from __future__ import annotations

import re
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.fault import UserError
from data_pipeline.shard_index import Place
from data_pipeline.tar_headers import Member, TarReader

# WebDataset's convention: the key is the path up to the first dot of the file name, the rest the extension.
MEMBER_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$", re.DOTALL)
# What webdataset's own decoder would unpickle, run or build objects of: never opened, only counted.
UNSUPPORTED = frozenset(
    {
        "pkl",
        "pickle",
        "pyd",
        "pth",
        "pt",
        "ckpt",
        "joblib",
        "dill",
        "npy",
        "npz",
        "cbor",
        "mp",
        "msg",
        "ten",
        "tb",
    }
)
# What file managers leave behind.
LITTER = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})
HIDDEN, NO_EXTENSION = "hidden", "without an extension"
# Columns of an index; a tar that has more has dots in the names of its files.
MAX_EXTENSIONS = 64

Visit = Callable[[str, str, bytes], object]  # is told key, extension and bytes; ValueError says what is wrong


@dataclass(frozen=True)
class TarIndex:
    """The samples of a tar in their order (key -> extension -> place), its SHA-256 and size in bytes.

    `ignored` counts the members that belong to no sample, by the reason.
    """

    rows: dict[str, dict[str, Place]]
    sha256: str
    size: int
    ignored: dict[str, int]


def tar_members(path: Path) -> dict[str, dict[str, Place]]:
    """Key -> extension -> place, in the order of the tar; DATA or UNSAFE where it is none to be used."""
    return index_one(path).rows


def index_one(
    path: Path,
    *,
    wanted: Callable[[str], int] | None = None,
    visit: Visit | None = None,
    at_most: int | None = None,
) -> TarIndex:
    """Read a tar from front to back; DATA or UNSAFE, with shard, member and offset, where it cannot be used.

    `visit` is told as many of a member's first bytes as `wanted` says of its extension, unless that is 0.
    With `at_most` samples the pass ends there, and the rest of the tar remains unseen.
    """
    rows: dict[str, dict[str, Place]] = {}
    ignored: Counter[str] = Counter()
    extensions: set[str] = set()

    def chosen(name: str) -> int:
        parts = member_parts(name)
        return 0 if wanted is None or isinstance(parts, str) else wanted(parts[1])

    _check_plain(path)
    with path.open("rb", buffering=1 << 17) as file:
        reader = TarReader(file, path.name)
        for member in reader.members(chosen):
            parts = member_parts(member.name)
            if isinstance(parts, str):
                ignored[parts] += 1
                continue
            key, extension = parts
            if at_most is not None and len(rows) == at_most and key not in rows:
                break
            extensions.add(extension)
            if extension in rows.get(key, {}):
                raise _twice(reader, member)
            if len(extensions) > MAX_EXTENSIONS:
                raise _too_many_kinds(reader, member, key)
            rows.setdefault(key, {})[extension] = (member.offset, member.size, member.crc32)
            if visit is not None and member.data is not None:
                _visited(reader, member, visit, parts)
        return TarIndex(rows, reader.sha256, reader.size, dict(sorted(ignored.items())))


def member_parts(name: str) -> tuple[str, str] | str:
    """Key and extension of a member of a sample; else, in words, why it belongs to none."""
    if any(part in LITTER or (part[:1] == "." and part.strip(".")) for part in name.split("/")):
        return HIDDEN
    match = MEMBER_NAME.match(name)
    if match is None:
        return NO_EXTENSION
    key, extension = match.groups()
    last = extension.rpartition(".")[2].lower()
    return f"unsupported .{last}" if last in UNSUPPORTED else (key, extension)


def _check_plain(path: Path) -> None:
    """Before it is opened: opening a named pipe would wait for ever."""
    try:
        kind = path.stat().st_mode
        readable = stat.S_ISREG(kind)
        if readable:
            path.open("rb").close()
    except OSError as error:
        raise UserError(
            f"cannot open shard '{path}': {error.strerror}",
            mend="check the path and who may read it",
            place={"shard": path.name},
        ) from None
    if not readable:
        raise UserError(f"'{path}' is no file", mend="give tars, or a folder that holds tars")


def _twice(reader: TarReader, member: Member) -> UserError:
    return reader.fault(
        f"holds member {member.name!r} twice",
        at=member.offset,
        member=member.name,
        mend="give each sample its own key and write the tar again",
    )


def _too_many_kinds(reader: TarReader, member: Member, key: str) -> UserError:
    return reader.fault(
        f"has more than {MAX_EXTENSIONS} kinds of members: that of {member.name!r} has the key {key!r}",
        at=member.offset,
        member=member.name,
        mend="a key ends at the first dot of the file's name: write the tar again without dots in the keys",
    )


def _visited(reader: TarReader, member: Member, visit: Visit, parts: tuple[str, str]) -> None:
    assert member.data is not None
    try:
        visit(*parts, member.data)
    except UserError:
        raise
    except ValueError as error:
        raise reader.fault(
            f"member {member.name!r}: {error}",
            at=member.offset,
            member=member.name,
            mend="mend it at its source and write the tar again",
        ) from None
